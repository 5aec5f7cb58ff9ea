"""Miniature copies of the official layouts, rendered here: annotations and videos as the datasets hand them out."""
import json
import numpy as np
from PIL import Image
from data_videos import numbered, render
from video_study.data.decode import read

CARDS = {
    "kinetics_small": dict(num_classes=2, annotations="kinetics", published={"A table": {"train": "4", "val": "1k"}}),
    "something_small": dict(num_classes=3, annotations="something", flip={0: 1, 1: 0}, fps=12),
    "mini_something_small": dict(num_classes=1, annotations="something", half_of="something_small", flip={0: 1, 1: 0}),
    "moments_small": dict(num_classes=2, annotations="moments"),
    "ucf_small": dict(num_classes=2, annotations="ucf101", folds=3),
    "hmdb_small": dict(num_classes=2, annotations="hmdb51", folds=3),
    "charades_small": dict(num_classes=2, annotations="charades", task="multilabel", sampling="dense", stride=2),
    "ava_small": dict(num_classes=2, annotations="ava", task="boxes", sampling="dense", stride=1),
}
TURNS = ["Pushing something from left to right", "Pushing something from right to left", "Closing something"]


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def clip(path, frames=12, shift=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    return render(path, frames, height=48, width=64, draw=lambda k, h, w: numbered(k + shift, h, w), **options)


def project(folder):
    "A project with cards of the small datasets and none of their videos."
    import yaml
    write(folder / "settings.ini", "lib_name = video_study")
    for name, told in CARDS.items(): write(folder / "data_manifests" / f"{name}.yaml", yaml.safe_dump({"name": name, **told}))
    return folder


def kinetics(folder):
    head = "label,youtube_id,time_start,time_end,split"
    write(folder / "a/train.csv", head, "eating cake,abc,5,15,train", "eating cake,def,0,10,train", "air drumming,ghi,0,10,train", "air drumming,gone,0,10,train")
    write(folder / "a/val.csv", head, "eating cake,jkl,0,10,val", "air drumming,mno,3,13,val")
    for k, name in enumerate(("train/eating_cake/abc_000005_000015.mp4", "train/eating_cake/def.mkv", "train/air_drumming/ghi_000000_000010.mp4",
                              "val/eating_cake/jkl_000000_000010.mp4", "val/air_drumming/mno_000003_000013.mp4", "val/air_drumming/unnamed.mp4")): clip(folder / "v" / name, shift=16 * k)
    return folder


def something(folder):
    write(folder / "a/labels.json", json.dumps({c: str(k) for k, c in enumerate(TURNS)}))
    told = lambda n, k: dict(id=str(n), label="x", template=TURNS[k].replace("something", "[something]"), placeholders=["x"])
    write(folder / "a/train.json", json.dumps([told(1, 0), told(2, 1), told(3, 2)]))
    write(folder / "a/validation.json", json.dumps([told(4, 0), told(5, 1), told(6, 2)]))
    for n in range(1, 7): clip(folder / "v" / f"{n}.mp4", shift=16 * n)
    return folder


def extracted(folder, start="{:05d}.jpg"):
    "The same videos as folders of pictures."
    something(folder)
    for n in range(1, 7):
        (folder / "f" / str(n)).mkdir(parents=True)
        for k, frame in enumerate(read(folder / "v" / f"{n}.mp4", range(12))): Image.fromarray(frame).save(folder / "f" / str(n) / start.format(k + 1), quality=95)
    return folder


def moments(folder):
    write(folder / "a/moments_categories.txt", "barking,1", "applauding,0")
    write(folder / "a/trainingSet.csv", "barking/dog_1.mp4,barking,3,0", "applauding/hall_1.mp4,applauding,3,0")
    write(folder / "a/validationSet.csv", "barking/dog_2.mp4,barking,3,0", "applauding/dog_1.mp4,applauding,3,0")
    for k, name in enumerate(("training/barking/dog_1", "training/applauding/hall_1", "validation/barking/dog_2", "validation/applauding/dog_1")): clip(folder / "v" / f"{name}.mp4", shift=16 * k)
    return folder


def ucf101(folder):
    write(folder / "a/classInd.txt", "1 Biking", "2 Archery")
    for fold in 1, 2, 3:
        write(folder / f"a/trainlist0{fold}.txt", *(f"{c}/v_{c}_g0{g}_c01.avi {n}" for n, c in ((1, "Biking"), (2, "Archery")) for g in (1, 2, 3) if g != fold))
        write(folder / f"a/testlist0{fold}.txt", *(f"{c}/v_{c}_g0{fold}_c01.avi" for c in ("Biking", "Archery")))
    for n, c in enumerate(("Biking", "Archery")):
        for g in 1, 2, 3: clip(folder / "v" / c / f"v_{c}_g0{g}_c01.avi", 24, 32 * (3 * n + g), codec="mpeg4")
    return folder


def hmdb51(folder):
    for n, c in enumerate(("wave", "clap")):
        write(folder / f"a/{c}_test_split1.txt", f"{c}_1.avi 1", f"{c}_2.avi 2", f"{c}_3.avi 0")
        for k in 1, 2, 3: clip(folder / "v" / c / f"{c}_{k}.avi", 12, 16 * (3 * n + k), codec="mpeg4")
    return folder


def charades(folder):
    write(folder / "a/Charades_v1_classes.txt", "c000 Holding some clothes", "c001 Putting clothes somewhere")
    write(folder / "a/Charades_v1_train.csv", "id,subject,actions,length", "AAAAA,S,c001 11.90 21.20;c000 0.00 12.60,24.83", "BBBBB,S,,18.4")
    write(folder / "a/Charades_v1_test.csv", "id,subject,actions,length", "CCCCC,S,c000 0.00 3.00,33.0", "DDDDD,S,c001 0.00 3.00;c001 5 6,3.0")
    for k, v in enumerate("ABCD"): clip(folder / "v" / f"{v * 5}.mp4", 40, 50 * k)
    return folder


def ava(folder):
    write(folder / "a/ava_action_list_v2.1.pbtxt", 'item {', '  name: "stand"', '  id: 12', '}', 'item {', '  name: "answer phone"', '  id: 17', '}')
    write(folder / "a/ava_train_v2.1.csv", "film,0902,0.1,0.2,0.5,0.9,12,0", "film,0902,0.1,0.2,0.5,0.9,17,0", "film,0902,0.6,0.1,0.9,0.8,12,1", "film,0903,0.6,0.1,1.9,0.8,12,1",
          "film,0950,0.6,0.1,0.9,0.8,12,1")
    write(folder / "a/ava_val_v2.1.csv", "movie,0902,0.1,0.2,0.5,0.9,17,0", "movie,0903,0.1,0.2,0.5,0.9,12,0", "movie,0904,0.1,0.2,0.5,0.9,12,0")
    write(folder / "a/ava_val_excluded_timestamps_v2.1.csv", "movie,0904")
    write(folder / "found.csv", "movie,0902,0.1,0.2,0.5,0.9,,0.95", "movie,0902,0.5,0.2,0.9,0.9,,0.7")
    for k, v in enumerate(("film", "movie")): clip(folder / "v" / f"{v}.mkv", 25 * 6, 160 * k)
    return folder
