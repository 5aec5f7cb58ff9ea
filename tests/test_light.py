"""With torch and torchvision alone, models, their costs and training on clips in memory work; importing is light."""
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = """
import sys
for name in ('pandas', 'pyarrow', 'decord', 'av', 'filelock', 'yaml', 'tqdm', 'submitit', 'papermill', 'seaborn', 'matplotlib', 'nbdev', 'fastcore', 'IPython', 'cv2',
             'nbconvert', 'nbformat', 'jupyter_client'):
    sys.modules[name] = None  # importing it fails, as if it were not installed
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", BLOCK + code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_import_is_light():
    run("import video_study; assert not {'torch', 'numpy'} & set(sys.modules), 'video_study imports torch or numpy'")


def test_models_and_costs_need_torch_only():
    run("""
import torch
from video_study import count, create_model
for name in ("tam_resnet50", "i3d_inception_v1", "r2plus1d_18", "slowfast_resnet50", "x3d_s"):
    with torch.device("meta"): model = create_model(name, num_classes=10)
    assert count(model, (3, model.spec.frames, 224, 224)).macs > 1e9
model = create_model("tam_resnet18", num_classes=3, frames=4, width=0.125)
assert model(torch.randn(1, 3, 4, 32, 32)).shape == (1, 3)
""")


def test_clips_in_memory_train_without_a_decoder():
    run("""
import numpy as np, torch
from video_study.models.registry import create_model
from video_study.training.recipes import Recipe
from video_study.training.trainer import Trainer, train, updates_per_epoch
from video_study.data.clips import to_input
clips = torch.randint(0, 255, (8, 4, 32, 32, 3), dtype=torch.uint8); labels = torch.arange(8) % 2
class Batch:
    def __init__(self, i): self.clips, self.labels, self.index = clips[i], labels[i], torch.tensor(i)
model = create_model("tam_resnet18", num_classes=2, frames=4, width=0.125)
recipe = Recipe(epochs=2, batch_size=4)
trainer = Trainer(model, recipe, lambda c: to_input(c, model.spec.mean, model.spec.std), 0, torch.device("cpu"))
train(trainer, lambda epoch, start: (Batch(list(range(i, i + 4))) for i in range(4 * start, 8, 4)), updates_per_epoch(8, recipe), lambda: None, 60, lambda t: None)
assert len(trainer.history) == 2
""")
