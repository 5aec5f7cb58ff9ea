"""Weights that are only evaluated: an experiment without epochs says of them what their own run said, and what they do on longer clips."""
from dataclasses import replace

import pytest

from video_study.training.experiment import experiment
from video_study.training.loop import fit
from video_study.training.recipes import recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIDEO_STUDY_OUTPUTS", str(tmp_path_factory.mktemp("outputs")))
        exp = experiment(model="tsn_resnet18", data="motion", frames=2, image_size=32, width=0.125, epochs=1, warmup_epochs=0, batch_size=64)
        yield exp, fit(exp, progress=False)


def test_says_what_the_run_said(trained):
    exp, run = trained
    again = fit(replace(exp, weights=str(run.folder / "weights.pt"), recipe=recipe("evaluate", batch_size=64)), progress=False)
    assert again.key != run.key
    assert again.metrics == run.metrics
    assert (again.scores()["scores"] == run.scores()["scores"]).all()
    assert again.history() == []


def test_on_other_clips(trained):
    exp, run = trained
    longer = fit(replace(exp, weights=str(run.folder / "weights.pt"), recipe=recipe("evaluate", batch_size=64), frames=4), progress=False)
    assert (longer.scores()["scores"] != run.scores()["scores"]).any()
