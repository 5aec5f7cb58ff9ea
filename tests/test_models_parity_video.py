"""The 3D networks against implementations that others wrote: the same weights in, the same logits out."""
import pytest
import torch
from torch import nn

from video_study.core import StudyError
from video_study.models.registry import create_model

peers = pytest.importorskip("torchvision").models


@pytest.fixture(autouse=True)
def reproducible():
    torch.manual_seed(0)


def lively(model):
    """Random weights and statistics everywhere, so that nothing can hide behind ones and zeros."""
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm3d)):
            m.running_mean.normal_(std=0.2)
            m.running_var.uniform_(0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.2)
        elif isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, std=0.05)
            nn.init.normal_(m.bias, std=0.5)
    return model.eval()


@torch.no_grad()
def assert_equal_logits(ours, theirs, clip):
    got, expected = ours.eval()(clip), theirs(clip)
    assert got.shape == expected.shape
    assert expected.std() > 1e-3 * expected.abs().max(), "the peer says the same of every class: nothing is compared"
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


VIDEO = [("r3d_18", {}), ("mc3_18", {}), ("r2plus1d_18", dict(mid_channels="block"))]


@pytest.mark.parametrize("name, options", VIDEO, ids=[n for n, _ in VIDEO])
def test_video_resnets_of_torchvision(name, options, tmp_path):
    peer = lively(getattr(peers.video, name)(weights=None, num_classes=11))
    torch.save(peer.state_dict(), tmp_path / "peer.pth")
    ours = create_model(name, num_classes=11, bn_eps=1e-5, weights=tmp_path / "peer.pth", **options)
    assert (ours.loaded.layout, ours.loaded.unused, ours.loaded.missing) == ("torchvision video ResNet", [], [])
    assert_equal_logits(ours, peer, torch.randn(2, 3, 8, 48, 48))


def test_torchvision_r2plus1d_is_not_the_papers(tmp_path):
    """Its mid channels are computed once a block, so its weights do not fit the network of the paper, and the error says which option they need."""
    torch.save(peers.video.r2plus1d_18(weights=None).state_dict(), tmp_path / "r2plus1d_18.pth")
    with pytest.raises(StudyError, match=r"does not fit r2plus1d_18: 18 of another shape \(layer2.0.conv2.0.0.weight"):
        create_model("r2plus1d_18", weights=tmp_path / "r2plus1d_18.pth")


def ibm_name(ours, factorised):
    """The name that IBM's action-recognition-pytorch gives a tensor, after the definitions of its i3d, s3d, i3d_resnet and s3d_resnet."""
    name = ours.removeprefix("backbone.")
    block, _, leaf = name.rpartition(".")
    for conv in factorised:
        conv = conv.removeprefix("backbone.")
        place, _, number = conv.rpartition("conv")
        known = {f"{conv}.spatial": f"{place}conv{number}", f"{conv}.bn": f"{place}bn{number}", f"{conv}.temporal": f"{place}conv{number}_t",
                 f"{place}bn{number}": f"{place}bn{number}_t"}
        if block in known:
            return f"module.{known[block]}.{leaf}"
    return f"module.{name}"


IBM = [("i3d_resnet18", {}), ("i3d_resnet50", dict(temporal_pooling=True)), ("s3d_resnet18", dict(temporal_pooling=True)), ("s3d_resnet50", {}),
       ("i3d_inception_v1", {}), ("s3d_inception_v1", dict(temporal_pooling=True))]


@pytest.mark.parametrize("name, options", IBM, ids=[n for n, _ in IBM])
def test_files_of_ibm_action_recognition(name, options, tmp_path):
    made = lively(create_model(name, num_classes=7, width=0.25, **options))
    factorised = [n for n, m in made.named_modules() if hasattr(m, "spatial")]
    state = {ibm_name(k, factorised): v for k, v in made.state_dict().items()}
    assert len(state) == len(made.state_dict())
    if factorised and "resnet18" in name:  # spot checks against the definitions, in case both maps are wrong alike
        assert {"module.layer1.0.conv1.weight", "module.layer1.0.conv1_t.weight", "module.layer1.0.bn1_t.running_var"} <= state.keys()
    if name == "s3d_inception_v1":
        assert {"module.conv3.conv_t.bias", "module.inception3a.branch2.1.bn_t.weight"} <= state.keys()
    torch.save(dict(epoch=75, arch=name, state_dict=state, best_top1=60.0), tmp_path / "model_best.pth.tar")
    ours = create_model(name, num_classes=7, width=0.25, weights=tmp_path / "model_best.pth.tar", **options)
    assert (ours.loaded.layout, ours.loaded.unused, ours.loaded.missing) == ("IBM action-recognition-pytorch", [], [])
    clip = torch.randn(2, 3, 8, 48, 48)
    with torch.no_grad():
        assert torch.equal(ours.eval()(clip), made(clip))


def test_own_files_of_factorised_networks(tmp_path):
    """Our own names pass through unchanged, although some of them mean another thing in other projects."""
    made = lively(create_model("s3d_resnet18", num_classes=7, width=0.25))
    torch.save(made.state_dict(), tmp_path / "weights.pt")
    ours = create_model("s3d_resnet18", num_classes=7, width=0.25, weights=tmp_path / "weights.pt")
    assert all(torch.equal(v, made.state_dict()[k]) for k, v in ours.state_dict().items())


def test_s3d_of_torchvision(tmp_path):
    """S3D as in its own paper. torchvision averages windows of two time steps; 16 frames leave just one such window, where both heads agree."""
    peer = lively(peers.video.s3d(weights=None, num_classes=11))
    torch.save(peer.state_dict(), tmp_path / "s3d.pth")
    ours = create_model("s3d_inception_v1", num_classes=11, frames=16, definition="xie", temporal_pooling=True, weights=tmp_path / "s3d.pth")
    assert_equal_logits(ours, peer, torch.randn(1, 3, 16, 224, 224))


def test_s3d_of_the_study_is_not_torchvisions():
    """The study's stem is one 3x7x7 convolution without temporal stride, its temporal convolutions have a bias, and it pools time elsewhere."""
    with torch.device("meta"):
        peer = peers.video.s3d(num_classes=87)
        ours = create_model("s3d_inception_v1", num_classes=87, temporal_pooling=True)
    assert sum(p.numel() for p in peer.parameters()) != sum(p.numel() for p in ours.parameters())
    assert ours.backbone.conv1.conv.weight.shape == (64, 3, 3, 7, 7)
    assert peer.features[0][0][0].weight.shape == (64, 3, 1, 7, 7)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_inflated_resnet_sees_in_a_still_clip_what_torchvisions_sees_in_the_image(name, tmp_path):
    """I3D's defining property against torchvision's image network: 17 temporal kernels reach 17 frames, so the middle of 35 is free of padding."""
    peer = lively(getattr(peers, name)(weights=None))
    torch.save(peer.state_dict(), tmp_path / "image.pth")
    ours = create_model(f"i3d_{name}", frames=35, inflation="divide", weights=tmp_path / "image.pth").backbone.eval()
    image = torch.randn(1, 3, 32, 32)
    seen = {}
    peer.layer4.register_forward_hook(lambda m, i, out: seen.update(out=out))
    with torch.no_grad():
        peer(image)
        middle = ours(image.unsqueeze(2).expand(-1, -1, 35, -1, -1))[:, :, 17]
    assert (middle - seen["out"]).abs().max() <= 1e-5 * seen["out"].abs().max()


def test_frames_and_sizes_that_a_network_cannot_take():
    for options, least in ((dict(), 2), (dict(temporal_pooling=True), 5)):
        with pytest.raises(StudyError, match=f"{least - 1} frames are too few .* give at least {least}"):
            create_model("s3d_inception_v1", frames=least - 1, **options)
    for name in ("mc3_18", "i3d_resnet18", "s3d_inception_v1"):
        with pytest.raises(StudyError, match="pixels is too small"):
            create_model(name, width=0.125)(torch.randn(1, 3, 8, 15, 48))
