"""Checkpoint files of other projects: networks with their layout and their arithmetic, written here anew, saved as they save them, loaded as ours."""
import argparse
import hashlib
import io
import os
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models as peers

from video_study.core import StudyError
from video_study.models import checkpoints
from video_study.models.registry import create_model

FRAMES = 8


@pytest.fixture(autouse=True)
def reproducible():
    torch.manual_seed(0)


def lively(model):
    """Random weights and statistics that keep signals alive, so that nothing can hide behind ones, zeros or a bias."""
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(m.weight)
        if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm3d)):
            m.running_mean.normal_(std=0.2)
            m.running_var.uniform_(0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.2)
        elif isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, std=0.05)
            nn.init.normal_(m.bias, std=0.5)
    return model.eval()


def clips(size=48, batch=2):
    return torch.randn(batch, 3, FRAMES, size, size)


@torch.no_grad()
def over_frames(image_net, clip):
    """Logits of an image network by frame, averaged."""
    frames = clip.transpose(1, 2).reshape(-1, 3, *clip.shape[3:])
    return image_net(frames).view(len(clip), -1, image_net.classes).mean(1)


@torch.no_grad()
def assert_equal_logits(ours, peer, clip):
    clip = clip.double()  # random weights can make logits of any size: rounding must not decide
    got, expected = ours.double().eval()(clip), over_frames(peer.double(), clip)
    assert (expected - expected.mean(0)).abs().max() > 1e-3 * expected.abs().max(), "the peer says the same of every clip: nothing is compared"
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def save(path, model, prefix="", **around):
    state = {prefix + k: v for k, v in model.state_dict().items()}
    torch.save(dict(state_dict=state, **around) if around else state, path)
    return path


# torchvision: image networks

@pytest.mark.parametrize("name, ours", [("resnet18", "tsn_resnet18"), ("resnet50", "tsn_resnet50"), ("googlenet", "tsn_inception_v1")])
def test_image_networks_of_torchvision(name, ours, tmp_path):
    options = dict(aux_logits=True, init_weights=False) if name == "googlenet" else {}
    peer = lively(getattr(peers, name)(weights=None, num_classes=5, **options))
    peer.classes = 5
    model = create_model(ours, num_classes=5, weights=save(tmp_path / "peer.pth", peer))
    assert (model.loaded.layout, model.loaded.new, model.loaded.replaced, model.loaded.missing) == ("torchvision image network", [], [], [])
    assert all(k.startswith("aux") for k in model.loaded.unused) and bool(model.loaded.unused) == (name == "googlenet")
    assert_equal_logits(model, peer, clips(64))


def test_head_is_replaced_when_the_classes_differ(tmp_path):
    file = save(tmp_path / "peer.pth", peers.resnet18(weights=None))
    model = create_model("tsm_resnet18", num_classes=6, weights=file)
    assert model.loaded.replaced == ["fc.weight", "fc.bias"] and model.fc.out_features == 6


def test_old_files_count_no_batches(tmp_path):
    peer = peers.resnet18(weights=None, num_classes=6)
    torch.save({k: v for k, v in peer.state_dict().items() if not k.endswith("num_batches_tracked")}, tmp_path / "old.pth")
    assert create_model("tsn_resnet18", num_classes=6, weights=tmp_path / "old.pth").loaded.missing == []


# IBM action-recognition-pytorch: torchvision's networks with `tam` modules of three 1x1 convolutions, whose results are shifted and summed

class Gate(nn.Module):
    def __init__(self, channels, depthwise):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels, 1, groups=channels if depthwise else 1, bias=False)


class Aggregate(nn.Module):
    def __init__(self, channels, depthwise=True, taps=3):
        super().__init__()
        if taps == 3: self.prev_se, self.next_se, self.curr_se = (Gate(channels, depthwise) for _ in range(3))
        else: self.blending_layers = nn.ModuleList(Gate(channels, depthwise) for _ in range(taps))
        self.gates = [self.prev_se, self.curr_se, self.next_se] if taps == 3 else list(self.blending_layers)

    def forward(self, x):
        total = torch.zeros_like(x).view(-1, FRAMES, *x.shape[1:])
        for i, gate in enumerate(self.gates):
            y, by = gate.fc1(x).view(total.shape), i - len(self.gates) // 2
            for t in range(FRAMES):
                if 0 <= t + by < FRAMES: total[:, t] += y[:, t + by]
        return total.relu().view(x.shape)


def before(module, first):
    """Let a block's first convolution see what `first` makes of its input; shortcuts see the input."""
    module.register_forward_pre_hook(lambda m, args: (first(args[0]),))


def ibm_resnet(net, **options):
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        for block in stage:
            block.tam = Aggregate(block.conv1.in_channels, **options)
            before(block.conv1, block.tam)
    return net


def ibm_inception(net):
    for name, module in list(net.named_children()):
        if name.startswith("conv") or name.startswith("inception"):
            cout = module.conv.out_channels if name.startswith("conv") else sum(b[-1].conv.out_channels if isinstance(b, nn.Sequential) else b.conv.out_channels
                                                                               for b in module.children())
            tam = Aggregate(cout)
            net.add_module("tam" + name.removeprefix("conv").removeprefix("inception"), tam)
            module.register_forward_hook(lambda m, args, out, tam=tam: tam(out))
    return net


IBM = [("tam_resnet18", lambda: ibm_resnet(peers.resnet18(weights=None, num_classes=7)), {}),
       ("tam_resnet50", lambda: ibm_resnet(peers.resnet50(weights=None, num_classes=7)), {}),
       ("tam_resnet18", lambda: ibm_resnet(peers.resnet18(weights=None, num_classes=7), taps=5), dict(taps=5)),
       ("tdc_resnet18", lambda: ibm_resnet(peers.resnet18(weights=None, num_classes=7), depthwise=False), {}),
       ("tsn_resnet18", lambda: peers.resnet18(weights=None, num_classes=7), {}),
       ("tam_inception_v1", lambda: ibm_inception(peers.googlenet(weights=None, num_classes=7, aux_logits=False, init_weights=False)), {})]


@pytest.mark.parametrize("name, make, options", IBM, ids=["tam_resnet18", "tam_resnet50", "tam_resnet18-5", "tdc_resnet18", "tsn_resnet18", "tam_inception_v1"])
def test_ibm_action_recognition(name, make, options, tmp_path):
    peer = lively(make())
    peer.classes = 7
    sgd = torch.optim.SGD(peer.parameters(), 0.1, momentum=0.9)
    file = save(tmp_path / "model_best.pth.tar", peer, "module.", epoch=75, arch=name, best_top1=torch.tensor(60.0), optimizer=sgd.state_dict())
    model = create_model(name, num_classes=7, weights=file, **options)
    assert (model.loaded.layout, model.loaded.unused, model.loaded.replaced) == ("IBM action-recognition-pytorch", [], [])
    assert_equal_logits(model, peer, clips())


def test_tam_does_not_take_a_tsn(tmp_path):
    file = save(tmp_path / "tsn.pth", peers.resnet18(weights=None, num_classes=7), "module.", epoch=1)
    with pytest.raises(StudyError, match=r"does not fit tam_resnet18: 8 missing in it \(backbone.layer1.0.temporal.conv.weight"):
        create_model("tam_resnet18", num_classes=7, weights=file)


# MIT temporal-shift-module: the convolution of a block stands behind a shift as `conv1.net`, non-local blocks wrap blocks as `block` and `nl`

class Shifted(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        x = x.view(-1, FRAMES, *x.shape[1:])
        past, future, rest = x.split([x.shape[2] // 8, x.shape[2] // 8, x.shape[2] - x.shape[2] // 8 * 2], 2)
        zero = lambda part: torch.zeros_like(part[:, :1])
        return self.net(torch.cat([torch.cat([past[:, 1:], zero(past)], 1), torch.cat([zero(future), future[:, :-1]], 1), rest], 2).flatten(0, 1))


class NonLocalAround(nn.Module):
    def __init__(self, block):
        super().__init__()
        c = block.bn3.num_features
        pool = nn.MaxPool3d((1, 2, 2))
        self.block, self.nl = block, nn.Module()
        self.nl.theta, self.nl.g = nn.Conv3d(c, c // 2, 1), nn.Sequential(nn.Conv3d(c, c // 2, 1), pool)
        self.nl.phi, self.nl.W = nn.Sequential(nn.Conv3d(c, c // 2, 1), pool), nn.Sequential(nn.Conv3d(c // 2, c, 1), nn.BatchNorm3d(c))

    def forward(self, x):
        x = self.block(x)
        clip = x.view(-1, FRAMES, *x.shape[1:]).transpose(1, 2)
        theta, phi, g = self.nl.theta(clip).flatten(2), self.nl.phi(clip).flatten(2), self.nl.g(clip).flatten(2)
        weight = torch.einsum("ncq,nck->nqk", theta, phi).softmax(2)
        y = torch.einsum("nqk,nck->ncq", weight, g).view(len(clip), -1, *clip.shape[2:])
        return (self.nl.W(y) + clip).transpose(1, 2).flatten(0, 1)


class Tsn(nn.Module):
    """The outside of the MIT networks: dropout in place of the base model's classifier, and a new one."""
    def __init__(self, base, classes=7):
        super().__init__()
        self.new_fc, self.classes = nn.Linear(base.fc.in_features, classes), classes
        base.fc = nn.Dropout(0.5)
        self.base_model = base

    def forward(self, x): return self.new_fc(self.base_model(x))


def stages(net):
    return [net.layer1, net.layer2, net.layer3, net.layer4]


def mit_tsm(net, every=1):
    for stage in stages(net):
        for i, block in enumerate(stage):
            if i % every == 0: block.conv1 = Shifted(block.conv1)
    return Tsn(net)


def mit_nln(net):
    for stage, places in ((net.layer2, (0, 2)), (net.layer3, (0, 2, 4))):
        for i in places: stage[i] = NonLocalAround(stage[i])
    return Tsn(net)


MIT = [("tsm_resnet18", lambda: mit_tsm(peers.resnet18(weights=None))), ("tsm_resnet50", lambda: mit_tsm(peers.resnet50(weights=None))),
       ("tsm_resnet101", lambda: mit_tsm(peers.resnet101(weights=None), every=2)), ("tsn_resnet18", lambda: Tsn(peers.resnet18(weights=None))),
       ("nln_resnet50", lambda: mit_nln(peers.resnet50(weights=None)))]


@pytest.mark.parametrize("name, make", MIT, ids=[n for n, _ in MIT])
def test_mit_temporal_shift_module(name, make, tmp_path):
    peer = lively(make())
    file = save(tmp_path / "TSM_ckpt.best.pth.tar", peer, "module.", epoch=50, arch=name, best_prec1=60.0)
    model = create_model(name, num_classes=7, weights=file)
    assert (model.loaded.layout, model.loaded.unused, model.loaded.replaced) == ("MIT temporal-shift-module", [], [])
    assert len(model.loaded.reshaped) == (20 if "nln" in name else 0)  # five blocks of four 1x1x1 convolutions
    assert_equal_logits(model, peer, clips())


# What is refused

def test_a_file_that_would_run_code_is_refused(tmp_path):
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self): return os.system, (f"touch {ran}",)

    torch.save(dict(state_dict=peers.resnet18(weights=None).state_dict(), args=Evil()), tmp_path / "evil.pth")
    torch.save(dict(state_dict={"conv1.weight": torch.zeros(1)}, args=argparse.Namespace(lr=0.1)), tmp_path / "args.pth")
    with pytest.raises(StudyError, match="evil.pth was refused: it holds an object of .*system"):
        create_model("tsn_resnet18", weights=tmp_path / "evil.pth")
    with pytest.raises(StudyError, match="args.pth was refused: it holds an object of argparse.Namespace"):
        create_model("tsn_resnet18", weights=tmp_path / "args.pth")
    assert not ran.exists()


def test_damaged_files_are_refused(tmp_path):
    buffer = io.BytesIO()
    torch.save(peers.resnet18(weights=None).state_dict(), buffer)
    for name, content in (("half.pth", buffer.getvalue()[:100_000]), ("nothing.pth", b""), ("text.pth", b"<html>404</html>")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(StudyError, match=f"{name} was refused: it is no checkpoint, or damaged"):
            create_model("tsn_resnet18", weights=tmp_path / name)


def test_what_does_not_fit_changes_nothing(tmp_path):
    model = create_model("tam_resnet18", num_classes=7, width=0.25)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    whole = dict(model.state_dict())
    wrong = {
        "1 missing in it (backbone.bn1.weight)": {k: v for k, v in whole.items() if k != "backbone.bn1.weight"},
        "1 of it unknown to the model (backbone.extra)": whole | {"backbone.extra": torch.zeros(2)},
        "1 of another shape (backbone.conv1.weight)": whole | {"backbone.conv1.weight": torch.zeros(8, 3, 7, 7)},
        "2 missing in it (fc.weight, fc.bias)": {k: v for k, v in whole.items() if not k.startswith("fc.")},
    }
    for message, state in wrong.items():
        torch.save({k: torch.ones_like(v) for k, v in state.items()}, tmp_path / "wrong.pth")
        with pytest.raises(StudyError) as error: checkpoints.load_weights(model, tmp_path / "wrong.pth")
        assert message in str(error.value) and "Nothing was loaded" in str(error.value)
    assert all(torch.equal(v, start[k]) for k, v in model.state_dict().items())


def test_width_and_half_precision(tmp_path):
    made = create_model("tam_inception_v1", num_classes=7, width=0.25)
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in made.state_dict().items()}, tmp_path / "half.pth")
    model = create_model("tam_inception_v1", num_classes=7, width=0.25, weights=tmp_path / "half.pth")
    assert model.fc.weight.dtype == torch.float32 and torch.equal(model.fc.weight, made.fc.weight.half().float())
    with pytest.raises(StudyError, match="of another shape"):
        create_model("tam_inception_v1", num_classes=7, width=0.5, weights=tmp_path / "half.pth")


# ImageNet weights

def hub(monkeypatch, tmp_path, answer):
    """Let torch keep its files under `tmp_path`, and the network give `answer`."""
    def urlopen(url, timeout):
        if isinstance(answer, Exception): raise answer
        response = io.BytesIO(answer)
        response.headers = {"Content-Length": len(answer)}
        return response
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(checkpoints, "urlopen", urlopen)
    return tmp_path / "hub" / "checkpoints"


def test_without_a_network_the_error_says_what_to_place_where(monkeypatch, tmp_path):
    folder = hub(monkeypatch, tmp_path, URLError("no route to host"))
    with pytest.raises(StudyError) as error: create_model("tam_resnet50", weights="imagenet")
    for part in ("ImageNet weights of resnet50", "no route to host", "Download https://download.pytorch.org/models/resnet50-0676ba61.pth",
                 f"place it as {folder / 'resnet50-0676ba61.pth'}"):
        assert part in str(error.value)


def test_imagenet_weights_are_fetched_once_and_checked(monkeypatch, tmp_path):
    peer, buffer = lively(peers.resnet18(weights=None)), io.BytesIO()
    torch.save(peer.state_dict(), buffer)
    name = f"resnet18-{hashlib.sha256(buffer.getvalue()).hexdigest()[:8]}.pth"
    monkeypatch.setattr(peers, "get_weight", lambda _: SimpleNamespace(url=f"https://example.invalid/{name}"))
    folder = hub(monkeypatch, tmp_path, buffer.getvalue())
    model = create_model("tam_resnet18", num_classes=6, weights="imagenet")
    assert torch.equal(model.backbone.layer4[1].conv2.weight, peer.layer4[1].conv2.weight) and len(model.loaded.new) == 8
    hub(monkeypatch, tmp_path, URLError("offline"))
    create_model("tsn_resnet18", num_classes=6, weights="imagenet")  # from the file
    (folder / name).write_bytes(buffer.getvalue()[:-1])
    with pytest.raises(StudyError, match="is not the file that its name promises"): create_model("tsn_resnet18", weights="imagenet")


def test_a_broken_download_leaves_no_file(monkeypatch, tmp_path):
    class Breaks(io.BytesIO):
        headers = {"Content-Length": "1000000"}
        def read(self, n):
            if self.tell(): raise ConnectionResetError("connection reset")
            return super().read(n)
    folder = hub(monkeypatch, tmp_path, b"")
    monkeypatch.setattr(checkpoints, "urlopen", lambda url, timeout: Breaks(b"x" * 100))
    with pytest.raises(StudyError, match="connection reset"): create_model("tsn_resnet18", weights="imagenet")
    assert list(folder.iterdir()) == []
