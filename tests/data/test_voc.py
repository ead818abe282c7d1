import pytest
from helpers import gradient, save

from retinanet.data.report import DataError
from retinanet.data.voc import VOC_CLASSES, VOCDataset
from retinanet.errors import UserError

OBJECT = """<object><name>{}</name><pose>Left</pose><difficult>{}</difficult>
<bndbox><xmax>{}</xmax><xmin>{}</xmin><ymax>{}</ymax><ymin>{}</ymin></bndbox>
<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>"""


def describe(name, x1, y1, x2, y2, difficult=0):
    """An object as VOC writes it: pixels count from 1, the last one is included, tags come in any order."""
    return OBJECT.format(name, difficult, x2, x1, y2, y1)


def write_voc(root, images, set_name="train", lines=None):
    """Write a set in VOC's layout; `images`: name without suffix -> objects."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, objects in images.items():
        save(gradient(40, 60), root / "JPEGImages" / f"{name}.png")
        xml = f"<annotation><filename>wrong.jpg</filename>{''.join(objects)}</annotation>"
        (root / "Annotations" / f"{name}.xml").write_text(xml)
    text = "".join(f"{name}\n" for name in images) if lines is None else lines
    (root / "ImageSets" / "Main" / f"{set_name}.txt").write_text(text)
    return root


def test_boxes_count_from_zero_and_end_after_the_last_pixel(tmp_path):
    root = write_voc(tmp_path, {"a": [describe("dog", 1, 1, 60, 40), describe("cat", 11, 6, 11, 20)]})
    data = VOCDataset(root, "train")
    assert len(data) == 1 and list(data.labels.values()) == list(VOC_CLASSES)
    dog, cat = data.name_to_label("dog"), data.name_to_label("cat")
    assert data.load_annotations(0).tolist() == [[0, 0, 60, 40, dog], [10, 5, 11, 20, cat]]
    assert data[0]["img"].shape == (40, 60, 3)
    assert data.image_sizes.tolist() == [[40, 60]]


def test_boxes_that_count_from_zero_stay_within_the_image(tmp_path):
    data = VOCDataset(write_voc(tmp_path, {"a": [describe("dog", 0, 0, 9.5, 20)]}))
    assert data.load_annotations(0)[:, :4].tolist() == [[0, 0, 9.5, 20]]


def test_difficult_boxes_are_kept_apart(tmp_path):
    objects = [describe("dog", 1, 1, 10, 10, difficult=1), describe("dog", 21, 21, 30, 30)]
    data = VOCDataset(write_voc(tmp_path, {"a": [], "b": objects}))
    assert [len(data.load_annotations(index)) for index in (0, 1)] == [0, 1]
    assert data.load_annotations(1)[0, :2].tolist() == [20, 20]
    assert [len(data.load_difficult(index)) for index in (0, 1)] == [0, 1]
    assert data.load_difficult(1)[0, :4].tolist() == [0, 0, 10, 10]


def test_sets_with_classes_other_than_vocs_agree_on_them(tmp_path):
    write_voc(tmp_path, {"a": [describe("wolf", 1, 1, 9, 9)]}, "train")
    write_voc(tmp_path, {"b": [describe("bear", 1, 1, 9, 9)]}, "val")
    for set_name, label in (("train", 1), ("val", 0)):
        data = VOCDataset(tmp_path, set_name)
        assert data.labels == {0: "bear", 1: "wolf"}
        assert data.load_annotations(0)[0, 4] == label
    assert VOCDataset(tmp_path, "val", class_names=["wolf", "bear"]).load_annotations(0)[0, 4] == 1
    (tmp_path / "classes.txt").write_text("wolf\nbear\nfox\n")
    assert list(VOCDataset(tmp_path, "train").labels.values()) == ["wolf", "bear", "fox"]


def test_a_set_with_vocs_classes_and_one_with_others_agree_on_them(tmp_path):
    write_voc(tmp_path, {"a": [describe("dog", 1, 1, 9, 9)]}, "train")
    write_voc(tmp_path, {"b": [describe("bear", 1, 1, 9, 9)]}, "val")
    assert VOCDataset(tmp_path, "train").labels == VOCDataset(tmp_path, "val").labels == {0: "bear", 1: "dog"}


def test_all_problems_are_reported_at_once(tmp_path):
    box = describe("dog", 1, 1, 9, 9)
    root = write_voc(tmp_path, {"a": [describe("dog", 6, 1, 4, 9), describe("dgo", 1, 1, 9, 9)], "b": [], "c": []})
    (root / "Annotations" / "b.xml").write_text("<annotation>")
    (root / "Annotations" / "c.xml").unlink()
    (root / "JPEGImages" / "c.png").unlink()
    with pytest.raises(DataError) as error:
        VOCDataset(root, class_names=["dog"])
    counts = {"inverted box": 1, "unknown class": 1, "missing image": 1, "bad entry": 1}
    assert error.value.report.counts == counts
    data = VOCDataset(write_voc(tmp_path / "good", {"a": [box, box, describe("dog", 1, 1, 9, 9, difficult=1)]}))
    assert data.report.counts == {"duplicate box": 1}
    assert len(data.annotations) == len(data.difficult_annotations) == 1


def test_the_list_of_one_class_is_a_set_too(tmp_path):
    data = VOCDataset(write_voc(tmp_path, {"a": [], "b": []}, "dog_train", "b -1\n\na  1\n"), "dog_train")
    assert [data.image_path(index)[-5:] for index in range(len(data))] == ["b.png", "a.png"]


def test_the_transform_is_applied(tmp_path):
    data = VOCDataset(write_voc(tmp_path, {"a": []}), transform=lambda sample: {**sample, "shape": sample["img"].shape})
    assert data[0]["shape"] == (40, 60, 3)


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        ("<annotation>", r"a\.xml: is not valid XML"),
        (describe("dog", 6, 1, 4, 9), r"a\.xml: object 1: a box needs x1 < x2"),
        (describe("", 1, 1, 4, 9), r"a\.xml: object 1: class '' is not in the class list"),
        (describe("dog", 1, 1, "nan", 9), r"a\.xml: object 1: a box needs finite numbers"),
        (describe("dog", "nan", 1, 9, 9), r"a\.xml: object 1: a box needs finite numbers"),
        (describe("dog", 1, 1, "", 9), r"a\.xml: object 1: needs a bndbox of four numbers"),
        ("<object><name>dog</name></object>", r"a\.xml: object 1: needs a bndbox of four numbers"),
    ],
)
def test_a_wrong_annotation_is_an_error_that_names_it(tmp_path, xml, message):
    root = write_voc(tmp_path, {"a": []})
    (root / "Annotations" / "a.xml").write_text(xml if xml == "<annotation>" else f"<annotation>{xml}</annotation>")
    with pytest.raises(UserError, match=message):
        VOCDataset(root)


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    root = write_voc(tmp_path, {"a": []})
    with pytest.raises(UserError, match=r"has no set named 'test'; its sets are: 'train'"):
        VOCDataset(root, "test")
    (root / "Annotations" / "a.xml").unlink()
    with pytest.raises(UserError, match=r"Annotations: 1 of the 1 listed images, such as a\.png"):
        VOCDataset(root)
    (root / "JPEGImages" / "a.png").unlink()
    with pytest.raises(UserError, match=r"train\.txt: image 'a' does not exist in .*JPEGImages"):
        VOCDataset(root)
    (root / "ImageSets" / "Main" / "train.txt").write_text("\n")
    with pytest.raises(UserError, match=r"train\.txt: lists no images"):
        VOCDataset(root)


def test_a_class_that_is_not_listed_is_an_error(tmp_path):
    root = write_voc(tmp_path, {"a": [describe("wolf", 1, 1, 9, 9)]})
    with pytest.raises(UserError, match=r"a\.xml: object 1: class 'wolf' is not in the class list \(dog, cat\)"):
        VOCDataset(root, class_names=["dog", "cat"])
    (root / "classes.txt").write_text("dog\ndog\n")
    with pytest.raises(UserError, match=r"classes\.txt: needs one class name per line, without repeats"):
        VOCDataset(root)


def test_a_name_may_hold_spaces_and_end_in_a_number(tmp_path):
    data = VOCDataset(write_voc(tmp_path, {"IMG 1": [], "b 2": []}, lines="IMG 1\nb 2 -1\n"))
    assert [data.image_path(index).rsplit("/", 1)[1] for index in (0, 1)] == ["IMG 1.png", "b 2.png"]


@pytest.mark.parametrize("mark", ["+1", "2", "1.0", "cat", "# a note"])
def test_the_second_column_may_hold_anything(tmp_path, mark):
    assert VOCDataset(write_voc(tmp_path, {"a": []}, lines=f"a {mark}\n")).image_path(0).endswith("a.png")


def test_two_images_with_one_name_are_an_error_only_if_it_is_listed(tmp_path):
    root = write_voc(tmp_path, {"a": []})
    for ending in ("png", "bmp"):
        save(gradient(40, 60), root / "JPEGImages" / f"z.{ending}")
    assert len(VOCDataset(root)) == 1
    with pytest.raises(UserError, match=r"z\.png: differs from z\.bmp only in its suffix"):
        VOCDataset(write_voc(tmp_path, {}, lines="a\nz\n"))


def test_messages_name_an_annotation_by_file_and_object(tmp_path):
    box = describe("dog", 1, 1, 9, 9)
    data = VOCDataset(write_voc(tmp_path, {"a": [box], "b": [describe("dog", 2, 2, 9, 9, "true"), box]}))
    assert data.annotation_name(1).endswith("b.xml: object 2") and len(data.difficult_annotations) == 1


def test_the_size_that_a_file_declares_is_known(tmp_path):
    root = write_voc(tmp_path, {"a": [], "b": []})
    xml = "<annotation><size><height>40</height><width>60</width></size></annotation>"
    (root / "Annotations" / "b.xml").write_text(xml)
    assert VOCDataset(root).image_sizes.tolist() == [[40, 60], [40, 60]]
    (root / "Annotations" / "b.xml").write_text(xml.replace("40", "0"))
    assert VOCDataset(root).image_sizes.tolist() == [[40, 60], [40, 60]]


def test_the_file_name_finds_an_image_of_another_name(tmp_path):
    root = write_voc(tmp_path, {"a": [describe("dog", 1, 1, 9, 9)]})
    (root / "JPEGImages" / "a.png").rename(root / "JPEGImages" / "wrong.png")
    assert VOCDataset(root).image_path(0).endswith("wrong.png")


def test_an_image_of_a_list_without_xml_has_no_objects_unless_most_have_none(tmp_path):
    root = write_voc(tmp_path, {"a": [describe("dog", 1, 1, 9, 9)], "b": [], "c": [], "d": []})
    for name in "bc":
        (root / "Annotations" / f"{name}.xml").unlink()
    report = VOCDataset(root).report
    assert report.counts == {"no annotations": 2} and len(report.examples["no annotations"]) == 1
    (root / "Annotations" / "d.xml").unlink()
    with pytest.raises(UserError, match=r"3 of the 4 listed images, such as b\.png, have .* without <object>"):
        VOCDataset(root)


def test_without_a_list_images_without_xml_are_left_out_and_counted(tmp_path):
    root = write_voc(tmp_path, {"a": [describe("dog", 1, 1, 9, 9)], "b": [], "c": []})
    (root / "ImageSets" / "Main" / "train.txt").unlink()
    for name in "bc":
        (root / "Annotations" / f"{name}.xml").unlink()
    data = VOCDataset(root)
    assert len(data) == 1 and data.report.counts == {"stray file": 2} and len(data.report.examples["stray file"]) == 1


def test_an_image_that_a_list_repeats_is_read_once(tmp_path):
    data = VOCDataset(write_voc(tmp_path, {"a": [], "b": []}, lines="a\nb\na 1\na.png\n"))
    assert len(data) == 2 and data.report.counts == {"repeated image": 2}


def test_problems_are_grouped_by_cause(tmp_path):
    objects = [describe("wolf", number, 1, number + 5, 9) for number in range(1, 9)]
    root = write_voc(tmp_path, {"a": objects, "b": [*objects, describe("fox", 1, 1, 9, 9)]}, lines="a\nb\nc\nd\n")
    with pytest.raises(DataError) as error:
        VOCDataset(root, class_names=["dog"])
    counts = {problem.cause: problem.count for problem in error.value.report.examples["unknown class"]}
    assert counts == {"wolf": 16, "fox": 1}
    for name in "ab":
        (root / f"JPEGImages/{name}.png").unlink()
    with pytest.raises(UserError, match=r"does not exist in .* \(4 times"):
        VOCDataset(root, class_names=["wolf", "fox"])


@pytest.mark.parametrize("text", ["<html>404</html>", "<annotations></annotations>", "<object/>"])
def test_xml_that_is_not_vocs_is_a_bad_entry(tmp_path, text):
    root = write_voc(tmp_path, {"a": [], "b": []})
    (root / "Annotations" / "a.xml").write_text(text)
    with pytest.raises(DataError, match=r"a\.xml: is not a VOC annotation: its root is"):
        VOCDataset(root)


def test_namespaces_and_letter_case_of_tags_and_floats_of_sizes_do_not_matter(tmp_path):
    root = write_voc(tmp_path, {"a": [describe("dog", 1, 1, 60, 40)]})
    path = root / "Annotations" / "a.xml"
    text = path.read_text().replace("object>", "Object>").replace("<annotation>", '<annotation xmlns="http://x.org">')
    size = "<size><width>{}</width><height> 40 </height></size>"
    path.write_text(text.replace("<Object>", size.format("60.0") + "<Object>"))
    data = VOCDataset(root)
    assert data.annotations[:, :4].tolist() == [[0, 0, 60, 40]] and data.declared_sizes.tolist() == [[40, 60]]
    assert data.report.counts == {}
    path.write_text(text.replace("<Object>", size.format("wide") + "<Object>"))
    data = VOCDataset(root)
    assert data.declared_sizes.tolist() == [[0, 0]] and data.report.counts == {"declared size": 1}


def test_numbers_with_digit_separators_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"needs a bndbox of four numbers .*'5_0'"):
        VOCDataset(write_voc(tmp_path, {"a": [describe("dog", "5_0", 1, 60, 40)]}))
