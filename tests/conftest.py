"""What every test needs: an interrupt that works, also in the processes that tests start."""
import signal

# A shell that starts a job in its background makes it ignore Ctrl-C, and every process below inherits that: CI does so.
signal.signal(signal.SIGINT, signal.default_int_handler)
