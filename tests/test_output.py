"""Output is complete or not there, whatever else happens to its place."""

import os

import pytest

from tools.errors import UserError
from tools.output import check_output, complete_output


def written(path, text, **options):
    with complete_output(path, **options) as temporary:
        temporary.write_text(text)


def test_what_another_process_wrote_meanwhile_is_kept(tmp_path):
    with (
        pytest.raises(UserError, match="was written by another process meanwhile"),
        complete_output(tmp_path / "a") as a,
    ):
        a.write_text("late")
        written(tmp_path / "a", "early")  # of the same number, as in two containers
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "early"
    with complete_output(tmp_path / "a", overwrite=True) as a:
        a.write_text("last")
        written(tmp_path / "a", "second", overwrite=True)
    assert (tmp_path / "a").read_text() == "last" and len(os.listdir(tmp_path)) == 1


def test_a_link_stays_and_the_output_is_where_it_points(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    for text in ("one", "two"):
        with complete_output(tmp_path / "link", overwrite=True, sign="sign") as folder:
            folder.mkdir()
            (folder / "sign").write_text(text)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "out" / "sign").read_text() == "two"
    assert len(os.listdir(tmp_path)) == 2 and len(os.listdir(tmp_path / "disk")) == 1


def test_nothing_replaces_what_it_is_made_of(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "sign").touch()
    vector = tmp_path / "old" / "liver.safetensors"
    vector.touch()
    with pytest.raises(UserError, match=r"would replace .*liver\.safetensors, of which it is made"):
        check_output(tmp_path / "old", True, "sign", inputs=[tmp_path / "start", vector])
    with pytest.raises(UserError, match="would replace"):
        check_output(vector, True, inputs=[vector])
    assert check_output(tmp_path / "old" / "new", False, inputs=[vector]) == tmp_path / "old" / "new"
