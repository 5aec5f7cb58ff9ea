"""Packaging: everything is read from settings.ini."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here / "settings.ini", encoding="utf-8")
s = config["DEFAULT"]


def lines(key):
    return [line.strip() for line in s.get(key, "").splitlines() if line.strip()]


study, dev = lines("study_requirements"), lines("dev_requirements")
setup(
    name=s["lib_name"],
    version=s["version"],
    description=s["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8") if (here / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=s["author"],
    author_email=s["author_email"],
    license="Apache-2.0",
    keywords=s["keywords"].split(),
    python_requires=f">={s['min_python']}",
    packages=find_packages(include=["video_study", "video_study.*"]),
    package_data={"video_study": ["evidence/published/*.csv"]},
    install_requires=lines("requirements"),
    extras_require={"study": study, "video": lines("video_requirements"), "flow": lines("flow_requirements"),
                    "dev": study + lines("video_requirements") + lines("flow_requirements") + dev},
    entry_points={"console_scripts": lines("console_scripts"), "nbdev": ["video_study=video_study._modidx:d"]},
    zip_safe=False,
)
