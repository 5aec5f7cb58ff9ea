"""Slow, SlowFast and X3D against pytorchvideo, and the checkpoint files of its zoo and of SlowFast's, both pickled and Caffe2."""
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from video_study.core import StudyError
from video_study.models.detection import Detector
from video_study.models.registry import create_model
from video_study.models.zoos import PTV_SLOW, PTV_SLOWFAST, rename


@pytest.fixture(autouse=True)
def reproducible():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def hub():
    with warnings.catch_warnings():  # its dependencies use what newer versions of torch call old
        warnings.simplefilter("ignore")
        return pytest.importorskip("pytorchvideo.models.hub", reason="pytorchvideo is not installed; pip install -e .[dev] brings it")


def lively(model):
    """Random weights and statistics everywhere, so that nothing can hide behind ones and zeros."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm3d):
            m.running_mean.normal_(std=0.2)
            m.running_var.uniform_(0.5, 2)
            nn.init.uniform_(m.weight, 0.2, 0.8)
            nn.init.normal_(m.bias, std=0.2)
        elif isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, std=0.05)
            nn.init.normal_(m.bias, std=0.5)
        elif isinstance(m, nn.Conv3d) and m.bias is not None:
            nn.init.normal_(m.bias, std=0.5)
    return model.eval()


def save(model, path, prefix=""):
    torch.save({"model_state": {prefix + k: v for k, v in model.state_dict().items()}}, path)
    return path


@torch.no_grad()
def assert_equal(got, expected):
    assert got.shape == expected.shape
    assert expected.std() > 1e-3 * expected.abs().max(), "the peer says the same of every class: nothing is compared"
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("size", ["xs", "s", "m", "l"])
@torch.no_grad()
def test_x3d(hub, size, tmp_path):
    peer = lively(getattr(hub, f"x3d_{size}")(model_num_class=11, head_activation=None))
    ours = create_model(f"x3d_{size}", num_classes=11, shortcut_bn=False, weights=save(peer, tmp_path / "peer.pyth")).eval()
    assert (ours.loaded.layout, ours.loaded.unused, ours.loaded.missing) == ("pytorchvideo X3D", [], [])
    peer.blocks[5].pool.pool = nn.AdaptiveAvgPool3d(1)  # it is built for one size of clip
    clip = torch.randn(2, 3, 4, 96, 64)
    assert_equal(ours(clip), peer(clip))


@torch.no_grad()
def test_x3d_at_the_published_crop_and_at_the_larger_one_of_tests(hub, tmp_path):
    peer = lively(hub.x3d_xs(model_num_class=11))  # with its own pooling and softmax
    ours = create_model("x3d_xs", num_classes=11, shortcut_bn=False, weights=save(peer, tmp_path / "peer.pyth")).eval()
    for pixels in (160, 182):
        clip = torch.randn(1, 3, 4, pixels, pixels)
        assert_equal(ours(clip).softmax(1), peer(clip))


@torch.no_grad()
def test_slow(hub, tmp_path):
    peer = lively(hub.slow_r50(model_num_class=11))
    ours = create_model("slow_resnet50", num_classes=11, weights=save(peer, tmp_path / "peer.pyth", prefix="model.")).eval()
    assert (ours.loaded.layout, ours.loaded.unused, ours.loaded.missing) == ("pytorchvideo ResNet", [], [])
    peer.blocks[5].pool = nn.AdaptiveAvgPool3d(1)
    clip = torch.randn(2, 3, 8, 96, 64)
    assert_equal(ours(clip), peer(clip))


@pytest.mark.parametrize("pathways", [dict(name="slowfast_resnet50", alpha=4), dict(name="slowfast_resnet101", alpha=4)], ids=lambda p: p["name"])
@torch.no_grad()
def test_slowfast(hub, pathways, tmp_path):
    peer = lively(getattr(hub, pathways["name"].replace("resnet", "r"))(model_num_class=11))
    ours = create_model(**pathways, num_classes=11, weights=save(peer, tmp_path / "peer.pyth")).eval()
    assert (ours.loaded.layout, ours.loaded.unused, ours.loaded.missing) == ("pytorchvideo SlowFast", [], [])
    peer.blocks[5].pool = nn.ModuleList(nn.AdaptiveAvgPool3d(1) for _ in range(2))
    clip = torch.randn(1, 3, 16, 64, 64)
    slow = clip[:, :, torch.linspace(0, 15, 16 // 4).long()]
    assert_equal(ours(clip), peer([slow, clip]))


@torch.no_grad()
def test_windows_are_those_of_the_released_head(hub):
    head = lively(hub.slow_r50(model_num_class=11, head_activation=nn.Softmax).blocks[5])
    ours = create_model("slow_resnet50", num_classes=11).eval().head
    ours.fc.load_state_dict(head.proj.state_dict())
    maps = torch.rand(2, 2048, 8, 8, 9)  # the windows of the released head are 8x7x7
    assert_equal(ours(maps).softmax(1), head(maps))


@pytest.mark.parametrize("name, frames, pairs", [("slow_resnet50", 2, PTV_SLOW), ("slowfast_resnet50", 16, PTV_SLOWFAST)], ids=["slow", "slowfast"])
@torch.no_grad()
def test_detection(hub, name, frames, pairs):
    """pytorchvideo's AVA networks: res5 dilated, RoIAlign in its first version, probabilities out."""
    peer = lively(getattr(hub, name.replace("resnet", "r") + "_detection")(model_num_class=11))
    backbone = create_model(name, num_classes=1, dilated=True)
    state = {rename(k, pairs): v for k, v in peer.model.state_dict().items()}
    assert set(backbone.state_dict()) - set(state) == {"head.fc.weight", "head.fc.bias"}
    backbone.load_state_dict(state, strict=False)
    ours = Detector(backbone, num_classes=11, aligned=False).eval()
    ours.fc.load_state_dict(peer.detection_head.proj.state_dict())
    for pool in [m for m in peer.modules() if isinstance(m, nn.AvgPool3d)]:
        pool.kernel_size = (pool.kernel_size[0] // 2, 1, 1)  # it is built for clips twice as long
    clip = torch.randn(2, 3, frames, 64, 96)
    boxes = [torch.tensor([[3.0, 5.0, 60.0, 62.0], [20.0, 0.0, 95.0, 40.0]]), torch.tensor([[1.0, 1.0, 30.0, 30.0]])]
    indexed = torch.tensor([[i, *box] for i, people in enumerate(boxes) for box in people.tolist()])
    theirs = clip if name == "slow_resnet50" else [clip[:, :, torch.linspace(0, frames - 1, frames // 4).long()], clip]
    assert_equal(ours(clip, boxes).sigmoid(), peer(theirs, indexed).flatten(1))


# The names below are written out from the networks' structure, not derived from the translation that is tested: (kind, SlowFast's name, Caffe2's name, ours).

DEPTHS = (3, 4, 6, 3)


def bottlenecks(depths, pathway, c2, ours, projected):
    for s, depth in zip((2, 3, 4, 5), depths):
        for j in range(depth):
            theirs, blob, here = f"s{s}.pathway{pathway}_res{j}", f"{c2}res{s}_{j}_branch", f"{ours}res{s}.block{j}"
            if projected(j):
                yield "conv", f"{theirs}.branch1", f"{blob}1", f"{here}.shortcut.conv"
                yield "bn", f"{theirs}.branch1_bn", f"{blob}1_bn", f"{here}.shortcut.bn"
            for c in "abc":
                yield "conv", f"{theirs}.branch2.{c}", f"{blob}2{c}", f"{here}.conv_{c}"
                yield "bn", f"{theirs}.branch2.{c}_bn", f"{blob}2{c}_bn", f"{here}.bn_{c}"


def pathway(p, depths=DEPTHS):
    ours, c2 = (("slow.", ""), ("fast.", "t_"))[p]
    yield "conv", f"s1.pathway{p}_stem.conv", f"{c2}conv1", f"{ours}stem.conv"
    yield "bn", f"s1.pathway{p}_stem.bn", f"{c2}res_conv1_bn", f"{ours}stem.bn"
    yield from bottlenecks(depths, p, c2, ours, lambda j: j == 0)


def slow_names(nonlocal_after=()):
    yield from pathway(0)
    for j in nonlocal_after:
        for part in ("theta", "phi", "g", "out"):
            yield "biased", f"s4.pathway0_nonlocal{j}.conv_{part}", f"nonlocal_conv4_{j}_{part}", f"slow.res4.nonlocal{j}.{part}"
        yield "bn", f"s4.pathway0_nonlocal{j}.bn", f"nonlocal_conv4_{j}_bn", f"slow.res4.nonlocal{j}.bn"
    yield "biased", "head.projection", "pred", "head.fc"


def slowfast_names():
    yield from pathway(0)
    yield from pathway(1)
    for i, blob in enumerate(("t_pool1_subsample", *(f"t_res{s}_{d - 1}_branch2c_bn_subsample" for s, d in zip((2, 3, 4), DEPTHS)))):
        yield "conv", f"s{i + 1}_fuse.conv_f2s", blob, f"fuse.{i}.conv"
        yield "bn", f"s{i + 1}_fuse.bn", f"{blob}_bn", f"fuse.{i}.bn"
    yield "biased", "head.projection", "pred", "head.fc"


def x3d_names(depths=(3, 5, 11, 7)):
    yield "conv", "s1.pathway0_stem.conv_xy", "conv1_xy", "stem.conv_xy"
    yield "conv", "s1.pathway0_stem.conv", "conv1", "stem.conv_t"
    yield "bn", "s1.pathway0_stem.bn", "res_conv1_bn", "stem.bn"
    yield from bottlenecks(depths, 0, "", "", lambda j: j == 0)
    for s, depth in zip((2, 3, 4, 5), depths):
        for j in range(0, depth, 2):
            for fc in ("fc1", "fc2"):
                yield "biased", f"s{s}.pathway0_res{j}.branch2.se.{fc}", f"res{s}_{j}_branch2b_bn_{fc}", f"res{s}.block{j}.se.{fc}"
    yield "conv", "head.conv_5", "conv_5", "head.conv5"
    yield "bn", "head.conv_5_bn", "conv_5_bn", "head.bn5"
    yield "conv", "head.lin_5", "lin_5", "head.lin5"
    yield "biased", "head.projection", "pred", "head.fc"


PARTS = {  # kind -> our part -> Caffe2's
    "conv": {"weight": "w"},
    "biased": {"weight": "w", "bias": "b"},
    "bn": {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"},
}


def as_slowfast(names, state):
    """A checkpoint as SlowFast's trainer saves it."""
    weights = {f"{theirs}.{part}": state[f"{ours}.{part}"] for kind, theirs, _, ours in names for part in PARTS[kind]}
    weights |= {f"{theirs}.num_batches_tracked": torch.tensor(7) for kind, theirs, _, _ in names if kind == "bn"}
    return {"epoch": 195, "model_state": weights, "optimizer_state": {"state": {}, "param_groups": [{"lr": 0.1}]}, "cfg": "NUM_GPUS: 8\n"}


def as_caffe2(names, state):
    """A checkpoint as Caffe2 saved it, with what its optimiser leaves behind."""
    blobs = {f"{c2}_{short}": state[f"{ours}.{part}"].numpy() for kind, _, c2, ours in names for part, short in PARTS[kind].items()}
    rubbish = {f"{k}_momentum": np.zeros(1, "float32") for k in list(blobs)[:5]}
    return {"blobs": blobs | rubbish | {"lr": np.float32(0.1), "model_iter": 46000}}


FILES = {
    "slow": ("slow_resnet50", {}, slow_names, 267),
    "slow with non-local blocks": ("slow_resnet50", dict(nonlocal_res4=True), lambda: slow_names((1, 3, 5)), None),
    "slowfast": ("slowfast_resnet50", {}, slowfast_names, 552),
    "x3d": ("x3d_s", {}, x3d_names, 484),
}


def assert_same_weights(model, made):
    for name, value in made.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("which", FILES)
def test_slowfast_files(which, tmp_path):
    name, options, names, _ = FILES[which]
    made = lively(create_model(name, num_classes=7, width=0.25, **options))
    torch.save(as_slowfast(list(names()), made.state_dict()), tmp_path / "checkpoint.pyth")
    model = create_model(name, num_classes=7, width=0.25, weights=tmp_path / "checkpoint.pyth", **options)
    assert_same_weights(model, made)
    assert model.loaded.layout == ("SlowFast X3D" if which == "x3d" else "SlowFast")
    assert (model.loaded.unused, model.loaded.missing, model.loaded.replaced) == ([], [], [])


@pytest.mark.parametrize("which", FILES)
def test_caffe2_files(which, tmp_path):
    name, options, names, count = FILES[which]
    made = lively(create_model(name, num_classes=7, width=0.25, **options))
    content = as_caffe2(list(names()), made.state_dict())
    if count: assert len(content["blobs"]) == count + 7  # the size of the released files
    (tmp_path / "checkpoint.pkl").write_bytes(pickle.dumps(content, protocol=2))
    model = create_model(name, num_classes=7, width=0.25, weights=tmp_path / "checkpoint.pkl", **options)
    assert_same_weights(model, made)
    assert model.loaded.layout == ("Caffe2 X3D" if which == "x3d" else "Caffe2 SlowFast")
    assert (len(model.loaded.unused), model.loaded.missing) == (5, [])  # momentum


def test_the_newer_name_of_a_nonlocal_normalisation(tmp_path):
    made = lively(create_model("slow_resnet50", num_classes=7, width=0.25, nonlocal_res4=True))
    content = as_slowfast(list(slow_names((1, 3, 5))), made.state_dict())
    content["model_state"] = {k.replace(".bn.", ".norm.") if "nonlocal" in k else k: v for k, v in content["model_state"].items()}
    torch.save(content, tmp_path / "checkpoint.pyth")
    assert_same_weights(create_model("slow_resnet50", num_classes=7, width=0.25, nonlocal_res4=True, weights=tmp_path / "checkpoint.pyth"), made)


def test_another_number_of_classes_replaces_the_classifier(tmp_path):
    made = lively(create_model("slow_resnet50", num_classes=7, width=0.25))
    torch.save(as_slowfast(list(slow_names()), made.state_dict()), tmp_path / "checkpoint.pyth")
    model = create_model("slow_resnet50", num_classes=3, width=0.25, weights=tmp_path / "checkpoint.pyth")
    assert model.loaded.replaced == ["head.fc.weight", "head.fc.bias"]
    assert torch.equal(model.slow.stem.conv.weight, made.slow.stem.conv.weight)


def test_the_two_forms_of_x3d_do_not_mix(tmp_path):
    made = create_model("x3d_s", num_classes=7, width=0.25)
    torch.save(as_slowfast(list(x3d_names()), made.state_dict()), tmp_path / "checkpoint.pyth")
    with pytest.raises(StudyError, match=r"5 of it unknown to the model \(res2.block0.shortcut.bn.*shortcut_bn=True"):
        create_model("x3d_s", num_classes=7, width=0.25, shortcut_bn=False, weights=tmp_path / "checkpoint.pyth")


def test_pytorchvideo_x3d_says_which_form_it_has(hub, tmp_path):
    path = save(hub.x3d_s(model_num_class=7), tmp_path / "peer.pyth")
    with pytest.raises(StudyError, match=r"4 missing in it \(res2.block0.shortcut.bn.*shortcut_bn=False"):
        create_model("x3d_s", num_classes=7, weights=path)


@pytest.mark.parametrize("options", [dict(name="slow_resnet101"), dict(name="slowfast_resnet50"), dict(name="slow_resnet50", nonlocal_res4=True)], ids=str)
def test_a_file_of_another_network_loads_nothing(options, tmp_path):
    made = lively(create_model("slow_resnet50", num_classes=7, width=0.25))
    torch.save(as_slowfast(list(slow_names()), made.state_dict()), tmp_path / "checkpoint.pyth")
    with pytest.raises(StudyError, match="does not fit.*missing in it"):
        create_model(**options, num_classes=7, width=0.25, weights=tmp_path / "checkpoint.pyth")


def test_the_fusion_kernel_must_be_that_of_the_file(tmp_path):
    made = create_model("slowfast_resnet50", num_classes=7, width=0.25)  # 8x8: a kernel of 7
    torch.save(as_slowfast(list(slowfast_names()), made.state_dict()), tmp_path / "checkpoint.pyth")
    with pytest.raises(StudyError, match=r"4 of another shape \(fuse.0.conv.weight"):
        create_model("slowfast_resnet50", num_classes=7, width=0.25, alpha=8, weights=tmp_path / "checkpoint.pyth")
