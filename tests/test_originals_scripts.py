"""What scripts written for yhenon/pytorch-retinanet do with its package, done with this one."""

import collections
import logging

import numpy as np
import pytest
import torch
from helpers import gradient, save, write_coco_data, write_csv_data
from torch.utils.data import DataLoader
from torchvision import transforms

from retinanet import coco_eval, csv_eval, model
from retinanet.dataloader import (
    AspectRatioBasedSampler,
    Augmenter,
    CocoDataset,
    CSVDataset,
    Normalizer,
    Resizer,
    UnNormalizer,
    collater,
)

SMALL = Resizer(min_side=64, max_side=96)  # the original always takes 608 and 1024


@pytest.fixture
def csv_files(tmp_path):
    """Four pictures, one of them without boxes."""
    lines = []
    for number in range(3):
        save(gradient(48 + 4 * number, 64), tmp_path / f"{number}.png")
        lines.append(f"{number}.png,4,8,{40 + number},40,{'circle' if number % 2 else 'triangle'}")
    save(gradient(48, 64), tmp_path / "empty.png")
    return write_csv_data(tmp_path, [*lines, "empty.png,,,,,"])


@pytest.fixture
def without_download(monkeypatch):
    """`pretrained=True` takes random weights in place of ImageNet's."""
    backbone = {
        key: value for key, value in model.resnet18(1).state_dict().items() if key.startswith(("layer", "bn1", "conv1"))
    }
    monkeypatch.setattr(model, "imagenet_weights", lambda depth, version: backbone)


def test_the_training_loop(csv_files, tmp_path, without_download):
    train_file, class_file = csv_files
    dataset_train = CSVDataset(
        train_file=train_file,
        class_list=class_file,
        transform=transforms.Compose([Normalizer(), Augmenter(), SMALL]),
    )
    sampler = AspectRatioBasedSampler(dataset_train, batch_size=2, drop_last=False)
    dataloader_train = DataLoader(dataset_train, num_workers=0, collate_fn=collater, batch_sampler=sampler)
    retinanet = model.resnet18(num_classes=dataset_train.num_classes(), pretrained=True)
    retinanet = torch.nn.DataParallel(retinanet)
    retinanet.training = True
    optimizer = torch.optim.Adam(retinanet.parameters(), lr=1e-5)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=3)
    loss_hist = collections.deque(maxlen=500)
    retinanet.train()
    retinanet.module.freeze_bn()
    statistics = retinanet.module.bn1.running_mean.clone()
    untrained = retinanet.module.classificationModel.output.weight.clone()

    for _ in range(2):
        retinanet.train()
        retinanet.module.freeze_bn()
        epoch_loss = []
        for data in dataloader_train:
            optimizer.zero_grad()
            classification_loss, regression_loss = retinanet([data["img"].float(), data["annot"]])
            classification_loss = classification_loss.mean()
            regression_loss = regression_loss.mean()
            loss = classification_loss + regression_loss
            if bool(loss == 0):
                continue
            loss.backward()
            torch.nn.utils.clip_grad_norm_(retinanet.parameters(), 0.1)
            optimizer.step()
            loss_hist.append(float(loss))
            epoch_loss.append(float(loss))
        assert len(epoch_loss) == len(dataloader_train) == 2
        scheduler.step(np.mean(epoch_loss))
        torch.save(retinanet.module, tmp_path / "csv_retinanet.pt")

    assert np.isfinite(loss_hist).all() and min(loss_hist) > 0
    assert not torch.equal(retinanet.module.classificationModel.output.weight, untrained)
    assert torch.equal(retinanet.module.bn1.running_mean, statistics)
    retinanet.eval()
    torch.save(retinanet, tmp_path / "model_final.pt")
    assert isinstance(torch.load(tmp_path / "model_final.pt", weights_only=False).module, model.RetinaNet)


def forget_logging(monkeypatch):
    """As in a script that has not set up any logging."""
    monkeypatch.setattr(logging.getLogger("retinanet"), "handlers", [])
    monkeypatch.setattr(logging.getLogger("retinanet"), "propagate", False)


def test_the_csv_validation(csv_files, filled_net, tmp_path, capsys, monkeypatch):
    forget_logging(monkeypatch)
    torch.save(filled_net, tmp_path / "model.pt")
    dataset_val = CSVDataset(*csv_files, transform=transforms.Compose([Normalizer(), SMALL]))
    retinanet = torch.load(tmp_path / "model.pt", weights_only=False)
    retinanet = torch.nn.DataParallel(retinanet)
    retinanet.training = False
    retinanet.eval()
    retinanet.module.freeze_bn()
    average_precisions = csv_eval.evaluate(dataset_val, retinanet, iou_threshold=float("0.5"))
    assert sorted(average_precisions) == [0, 1, 2] and "mAP 0." in capsys.readouterr().out
    for label in range(dataset_val.num_classes()):
        average_precision, num_annotations = average_precisions[label]
        assert 0 <= average_precision <= 1
        name = dataset_val.label_to_name(label)
        assert num_annotations == {"circle": 1, "rectangle": 0, "triangle": 2}[name]


def test_the_coco_validation(filled_net, tmp_path, without_download, capsys, monkeypatch):
    forget_logging(monkeypatch)
    torch.save(filled_net.state_dict(), tmp_path / "state_dict.pt")
    root = write_coco_data(tmp_path)
    dataset_val = CocoDataset(root, set_name="val2017", transform=transforms.Compose([Normalizer(), SMALL]))
    retinanet = model.resnet18(num_classes=3, pretrained=True)
    retinanet.load_state_dict(torch.load(tmp_path / "state_dict.pt"))
    retinanet = torch.nn.DataParallel(retinanet)
    retinanet.training = False
    retinanet.eval()
    retinanet.module.freeze_bn()
    dataset_val.coco_labels |= {2: 1000}  # the model knows a class more than these data
    metrics = coco_eval.evaluate_coco(dataset_val, retinanet)
    assert 0 <= metrics["AP"] <= 1 and not retinanet.training
    assert f"AP {metrics['AP']:.3f}" in capsys.readouterr().out


def test_the_visualisation(csv_files, filled_net):
    dataset_val = CSVDataset(*csv_files, transform=transforms.Compose([Normalizer(), SMALL]))
    sampler_val = AspectRatioBasedSampler(dataset_val, batch_size=1, drop_last=False)
    dataloader_val = DataLoader(dataset_val, num_workers=0, collate_fn=collater, batch_sampler=sampler_val)
    unnormalize = UnNormalizer()
    drawn = 0
    for data in dataloader_val:
        with torch.no_grad():
            scores, classification, transformed_anchors = filled_net(data["img"].float())
        idxs = np.where(scores.cpu() > 0.05)
        img = np.array(255 * unnormalize(data["img"][0, :, :, :])).copy()
        img[img < 0] = 0
        img[img > 255] = 255
        img = np.transpose(img, (1, 2, 0)).astype(np.uint8)
        assert img.shape[2] == 3 and img.shape[0] % 32 == img.shape[1] % 32 == 0
        for j in range(idxs[0].shape[0]):
            x1, y1, x2, y2 = (int(value) for value in transformed_anchors[idxs[0][j], :])
            assert 0 <= x1 <= x2 <= img.shape[1] and 0 <= y1 <= y2 <= img.shape[0]
            assert dataset_val.labels[int(classification[idxs[0][j]])] in ("circle", "rectangle", "triangle")
            drawn += 1
    assert drawn > 0


def test_unnormalized_pictures_are_the_pictures(csv_files):
    plain = CSVDataset(*csv_files)[0]["img"]
    normalized = CSVDataset(*csv_files, transform=Normalizer())[0]["img"]
    image = torch.from_numpy(normalized).permute(2, 0, 1)
    restored = (255 * UnNormalizer()(image)).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(restored, plain, atol=0.01)


def test_a_single_image(filled_net):
    """A picture prepared by hand, as visualize_single_image.py does: float, padded by up to a whole 32 pixels."""
    image = gradient(48, 64)
    rows, cols, channels = image.shape
    padded = np.zeros((rows + 32 - rows % 32, cols + 32 - cols % 32, channels)).astype(np.float32)
    padded[:rows, :cols, :] = image.astype(np.float32)
    padded /= 255
    padded -= [0.485, 0.456, 0.406]
    padded /= [0.229, 0.224, 0.225]
    batch = torch.from_numpy(np.transpose(np.expand_dims(padded, 0), (0, 3, 1, 2)))
    filled_net.training = False
    filled_net.eval()
    with torch.no_grad():
        scores, classification, transformed_anchors = filled_net(batch.float())
    assert batch.shape == (1, 3, 64, 96)
    assert len(scores) == len(classification) == len(transformed_anchors) > 0
    assert transformed_anchors.shape[1] == 4 and (scores[:-1] >= scores[1:]).all()
