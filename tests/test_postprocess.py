import pytest
import torch

from retinanet.postprocess import best_candidates, select_detections

FAR = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0], [40.0, 0.0, 50.0, 10.0], [60.0, 0.0, 70.0, 10.0]])


def logit(*scores):
    return torch.logit(torch.tensor(scores))


def select(logits, anchors=FAR, level_sizes=None, size=(100, 100), score_threshold=0.05, top_k=1000, **limits):
    candidates = best_candidates(logits, level_sizes or [len(anchors)], score_threshold, top_k)
    return select_detections(candidates, logits, torch.zeros(len(anchors), 4), anchors, size, **limits)


def test_best_first_above_the_threshold():
    found = select(logit([0.2, 0.01], [0.04, 0.9], [0.06, 0.0], [0.0, 0.0]))
    assert found.scores.tolist() == pytest.approx([0.9, 0.2, 0.06])
    assert found.labels.tolist() == [1, 0, 0]
    assert found.boxes.tolist() == FAR[[1, 0, 2]].tolist()


def test_nms_is_within_a_class():
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0]])
    assert select(logit([0.9, 0.0], [0.8, 0.0]), anchors).scores.tolist() == pytest.approx([0.9])
    assert select(logit([0.9, 0.0], [0.0, 0.8]), anchors).scores.tolist() == pytest.approx([0.9, 0.8])


def test_top_k_is_per_level():
    logits = logit([0.9], [0.8], [0.3], [0.2])
    assert select(logits, level_sizes=[2, 2], top_k=1).scores.tolist() == pytest.approx([0.9, 0.3])
    assert len(select(logits, level_sizes=[2, 2], top_k=None).scores) == 4


def test_max_detections():
    logits = logit([0.9], [0.8], [0.3], [0.2])
    assert select(logits, max_detections=2).scores.tolist() == pytest.approx([0.9, 0.8])
    assert len(select(logits, max_detections=None).scores) == 4


def test_nothing_found_is_empty_not_an_error():
    scores, labels, boxes = select(logit([0.01], [0.01], [0.01], [0.01]))
    assert scores.shape == labels.shape == (0,) and boxes.shape == (0, 4) and labels.dtype == torch.int64


def test_boxes_are_clipped():
    anchors = torch.tensor([[-10.0, -10.0, 200.0, 200.0]])
    assert select(logit([0.9]), anchors).boxes.tolist() == [[0, 0, 100, 100]]


def test_a_box_entirely_in_the_padding_is_not_a_detection():
    anchors = torch.tensor([[10.0, 10, 30, 30], [50, 10, 70, 30], [35, 10, 60, 30]])
    found = select(torch.full((3, 1), 3.0), anchors, size=(64, 40))
    assert found.boxes.tolist() == [[10, 10, 30, 30], [35, 10, 40, 30]]


@pytest.mark.parametrize(("threshold", "number"), [(-0.1, 4), (0, 4), (0.5, 2), (1, 0), (1.5, 0)])
def test_thresholds_at_and_beyond_the_ends(threshold, number):
    assert len(select(logit([0.9], [0.8], [0.3], [0.2]), score_threshold=threshold).scores) == number
