"""Checkpoint files of bLVNet-TAM and BigLittleNet: networks with their layout and arithmetic, written here anew, saved as they save them, loaded as ours."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from video_study.core import StudyError
from video_study.models.registry import create_model

BLOCKS = {50: (3, 4, 6, 3), 101: (4, 8, 18, 3)}
CLASSES = 7


@pytest.fixture(autouse=True)
def reproducible():
    torch.manual_seed(0)
    torch.set_num_threads(1)


class Peer:
    """A bLResNet as a flat dictionary of tensors and a function over them; with `frames`, a bLVNet-TAM."""

    def __init__(self, depth, frames=None, taps=3, classes=CLASSES, c=8, alpha=2, beta=4):
        self.state, self.frames, self.taps, self.depth, self.beta = {}, frames, taps, depth, beta
        thin = c // alpha
        self.conv("conv1", "bn1", 3, c, 7)
        for name, norm, cin, cout, k in (("b_conv0", "bn_b0", c, c, 3), ("l_conv0", "bn_l0", c, thin, 3), ("l_conv1", "bn_l1", thin, thin, 3),
                                         ("l_conv2", "bn_l2", thin, c, 1), ("bl_init", "bn_bl_init", c, c, 1)):
            self.conv(name, norm, cin, cout, k)
        self.tam("tam", c)
        cin = c
        for k, blocks in enumerate(BLOCKS[depth][:3], 1):
            cout = 4 * c * 2 ** (k - 1)
            self.tam(f"layer{k}.tam", cin)
            self.row(f"layer{k}.big", cin, cout, blocks - 1, True)
            self.row(f"layer{k}.little", cin, cout // alpha, max(1, blocks // beta - 1), False)
            self.conv(f"layer{k}.little_e.0", f"layer{k}.little_e.1", cout // alpha, cout, 1)
            self.row(f"layer{k}.fusion", cout, cout, 1, k < 3)
            cin = cout
        for i in range(3): self.tam(f"layer4.{i}.tam", cin if i == 0 else 2 * cin)
        self.row("layer4", cin, 2 * cin, 3, True)
        self.state |= {"fc.weight": torch.randn(classes, 2 * cin), "fc.bias": torch.randn(classes)}

    # what the files hold

    def conv(self, name, norm, cin, cout, k):
        self.state[f"{name}.weight"] = torch.randn(cout, cin, k, k) * (2 / (cin * k * k)) ** 0.5
        values = dict(weight=torch.rand(cout) + 0.5, bias=torch.randn(cout) * 0.2, running_mean=torch.randn(cout) * 0.2, running_var=torch.rand(cout) + 0.5)
        self.state |= {f"{norm}.{k}": v for k, v in values.items()} | {f"{norm}.num_batches_tracked": torch.tensor(5)}

    def tam(self, name, c):
        if self.frames is None: return
        names = ("prev", "next", "curr") if self.taps == 3 else [f"blending_layers.{i}" for i in range(self.taps)]
        self.state |= {f"{name}.{n}.weight": torch.randn(c, 1, 1, 1) for n in names}

    def row(self, name, cin, cout, blocks, stride):
        for i in range(blocks):
            a, inner, place = cin if i == 0 else cout, cout // 4, f"{name}.{i}"
            for n, (x, y, k) in enumerate(((a, inner, 1), (inner, inner, 3), (inner, cout, 1)), 1): self.conv(f"{place}.conv{n}", f"{place}.bn{n}", x, y, k)
            first = int(stride and i == 0)  # the average pool comes first and holds nothing
            if a != cout: self.conv(f"{place}.downsample.{first}", f"{place}.downsample.{first + 1}", a, cout, 1)

    # what they compute

    def apply(self, x, name, norm, stride=1):
        w = self.state[f"{name}.weight"]
        bn = [self.state[f"{norm}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(F.conv2d(x, w, stride=stride, padding=w.shape[2] // 2), *bn)

    def aggregate(self, x, name, frames):
        if self.frames is None: return x
        names = ("prev", "curr", "next") if self.taps == 3 else [f"blending_layers.{i}" for i in range(self.taps)]
        clips = x.view(-1, frames, *x.shape[1:])
        out = torch.zeros_like(clips)
        for tap, n in enumerate(names):
            for t in range(frames):
                if 0 <= t + tap - self.taps // 2 < frames: out[:, t] += self.state[f"{name}.{n}.weight"].view(-1, 1, 1) * clips[:, t + tap - self.taps // 2]
        return out.relu().view(x.shape)

    def block(self, x, name, stride, relu, frames):
        y, shortcut = x, x
        if frames: y = self.aggregate(x, f"{name}.tam", frames)
        projects = [k for k in (0, 1) if f"{name}.downsample.{k}.weight" in self.state and self.state[f"{name}.downsample.{k}.weight"].ndim == 4]
        if stride == 2 or projects:
            shortcut = F.avg_pool2d(y, 3, 2, 1) if stride == 2 else y  # of what the module made, as in the authors' code
            if projects: shortcut = self.apply(shortcut, f"{name}.downsample.{projects[0]}", f"{name}.downsample.{projects[0] + 1}")
        for n in (1, 2, 3):
            y = self.apply(y, f"{name}.conv{n}", f"{name}.bn{n}", stride if n == 2 else 1)
            if n < 3: y = y.relu()
        return (y + shortcut).relu() if relu else y + shortcut

    def rows(self, x, name, blocks, stride, last_relu=True, frames=None):
        for i in range(blocks): x = self.block(x, f"{name}.{i}", stride if i == 0 else 1, last_relu or i < blocks - 1, frames)
        return x

    def deal(self, x, name):
        """Frames for the big branch (the second of each pair) and for the little one."""
        x = self.aggregate(x, name, self.frames)
        return (x[1::2], x[0::2]) if self.frames else (x, x)

    def double(self, x): return torch.stack([x, x], 1).flatten(0, 1) if self.frames else x

    @torch.no_grad()
    def logits(self, clip):
        x = clip.transpose(1, 2).flatten(0, 1)
        big, little = self.deal(self.apply(x, "conv1", "bn1", 2).relu(), "tam")
        little = self.apply(self.apply(little, "l_conv0", "bn_l0").relu(), "l_conv1", "bn_l1", 2).relu()
        x = self.double(self.apply((self.apply(big, "b_conv0", "bn_b0", 2) + self.apply(little, "l_conv2", "bn_l2")).relu(), "bl_init", "bn_bl_init").relu())
        for k, blocks in enumerate(BLOCKS[self.depth][:3], 1):
            big, little = self.deal(x, f"layer{k}.tam")
            little = self.rows(little, f"layer{k}.little", max(1, blocks // self.beta - 1), 1)
            little = self.apply(little, f"layer{k}.little_e.0", f"layer{k}.little_e.1")
            big = F.interpolate(self.rows(big, f"layer{k}.big", blocks - 1, 2, last_relu=False), little.shape[2:])
            x = self.double(self.rows((big + little).relu(), f"layer{k}.fusion", 1, 2 if k < 3 else 1))
        if self.frames: x = x[1::2]
        x = self.rows(x, "layer4", 3, 2, frames=self.frames and self.frames // 2).mean((2, 3))
        return F.linear(x, self.state["fc.weight"], self.state["fc.bias"]).view(len(clip), -1, CLASSES).mean(1)

    # as their training scripts write it

    def published(self, head="new_fc"):
        return {f"{head}.{k[3:]}" if k.startswith("fc.") else f"baseline_model.{k}": v for k, v in self.state.items()}


def assert_equal_logits(model, expected, clip):
    with torch.no_grad(): got = model.eval()(clip)
    assert (expected - expected.mean(0)).abs().max() > 1e-3 * expected.abs().max(), "the peer says the same of every clip: nothing is compared"
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def clips(frames, size=48): return torch.randn(2, 3, frames, size, size)


@pytest.mark.parametrize("depth, taps, size", [(50, 3, 48), (101, 3, 40), (50, 5, 48)])
def test_blvnet_tam(depth, taps, size, tmp_path):
    peer = Peer(depth, frames=6, taps=taps)
    torch.save(peer.published(), tmp_path / f"st2stv1-bLVNet-TAM-{depth}-a2-b4-f3x2.pth.tar")
    model = create_model(f"blvnet_tam_blresnet{depth}", num_classes=CLASSES, frames=6, width=0.125, taps=taps,
                         weights=tmp_path / f"st2stv1-bLVNet-TAM-{depth}-a2-b4-f3x2.pth.tar")
    report = model.loaded
    assert (report.layout, report.reshaped, report.replaced, report.new, report.unused, report.missing) == ("bLVNet-TAM", [], [], [], [], [])
    assert len(report.matched) == len(model.state_dict())
    clip = clips(6, size)
    assert_equal_logits(model, peer.logits(clip), clip)


def test_the_training_scripts_own_checkpoint(tmp_path):
    peer = Peer(50, frames=4)
    state = {f"module.{k}": v for k, v in peer.published(head="baseline_model.fc").items()}  # without dropout the classifier stays where it was
    torch.save(dict(epoch=50, arch="st2stv2-bLVNet-TAM-50-a2-b4-f2x2", state_dict=state, best_top1=torch.tensor(59.1), optimizer={}), tmp_path / "model_best.pth.tar")
    longer = create_model("blvnet_tam_blresnet50", num_classes=CLASSES, frames=8, width=0.125, weights=tmp_path / "model_best.pth.tar")
    assert longer.loaded.layout == "bLVNet-TAM" and torch.equal(longer.fc.weight, peer.state["fc.weight"])
    other = create_model("blvnet_tam_blresnet50", num_classes=5, frames=4, width=0.125, weights=tmp_path / "model_best.pth.tar")
    assert other.loaded.replaced == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize("depth", [50, 101])
def test_blresnet_on_imagenet(depth, tmp_path):
    peer = Peer(depth)
    file = tmp_path / f"ImageNet-bLResNet-{depth}-a2-b4.pth.tar"
    torch.save(dict(epoch=110, state_dict={f"module.{k}": v for k, v in peer.state.items()}), file)
    model = create_model(f"blresnet_{depth}", num_classes=CLASSES, width=0.125, weights=file)
    assert (model.loaded.layout, model.loaded.new, model.loaded.unused, model.loaded.replaced) == ("BigLittleNet", [], [], [])
    image = clips(1)
    assert_equal_logits(model, peer.logits(image), image)


def test_from_imagenet_only_the_temporal_modules_are_new(tmp_path):
    peer = Peer(50, classes=11)
    torch.save({f"module.{k}": v for k, v in peer.state.items()}, tmp_path / "image.pth.tar")
    new = {name: create_model(f"{name}_blresnet50", num_classes=CLASSES, width=0.125, weights=tmp_path / "image.pth.tar").loaded
           for name in ("tsn", "blvnet", "blvnet_tsm", "blvnet_tam")}
    assert {name: len(report.new) for name, report in new.items()} == dict(tsn=0, blvnet=0, blvnet_tsm=0, blvnet_tam=7)
    assert all(".temporal." in name for name in new["blvnet_tam"].new)
    assert all(report.replaced == ["fc.weight", "fc.bias"] for report in new.values())


def test_what_does_not_fit_is_refused(tmp_path):
    tam = Peer(50, frames=4)
    torch.save(tam.published(), tmp_path / "tam.pth")
    torch.save({k: v for k, v in Peer(50).state.items() if k != "bn_l1.bias"}, tmp_path / "part.pth")
    with pytest.raises(StudyError, match=r"does not fit blvnet_blresnet50: 7 of it unknown to the model \(backbone.layer1.temporal.conv.weight"):
        create_model("blvnet_blresnet50", num_classes=CLASSES, width=0.125, weights=tmp_path / "tam.pth")
    with pytest.raises(StudyError, match="does not fit blvnet_tam_blresnet101: .* missing in it"):
        create_model("blvnet_tam_blresnet101", num_classes=CLASSES, width=0.125, weights=tmp_path / "tam.pth")
    with pytest.raises(StudyError, match="of another shape"):
        create_model("blvnet_tam_blresnet50", num_classes=CLASSES, width=0.125, alpha=4, weights=tmp_path / "tam.pth")
    with pytest.raises(StudyError, match=r"1 missing in it \(backbone.stem.little.4.bias\)"):
        create_model("blvnet_tam_blresnet50", num_classes=CLASSES, width=0.125, weights=tmp_path / "part.pth")
    with pytest.raises(StudyError, match="does not fit tsn_resnet50"):
        create_model("tsn_resnet50", num_classes=CLASSES, width=0.125, weights=tmp_path / "part.pth")
