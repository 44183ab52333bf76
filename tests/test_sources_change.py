"""A source that changes while it is converted: what is read may not, what lies beside it may."""

import os
import threading

import pytest

from blip2nb import api
from blip2nb.errors import RequestError

TWIN = "tiny-blip2-opt-2.7b"


@pytest.fixture
def convert_meanwhile(source_copy, tmp_path):
    """Convert while something is done over and over."""

    def convert(change):
        source, over = source_copy(TWIN), threading.Event()

        def again():
            while not over.wait(0.001):
                change(source)

        thread = threading.Thread(target=again)
        thread.start()
        try:
            return api.convert(TWIN, source, output=tmp_path / "model")
        finally:
            over.set()
            thread.join()

    return convert


def test_a_log_that_grows_beside_the_language_model_is_no_part_of_the_source(convert_meanwhile):
    def change(source):
        for name in ("opt-2.7b/log.txt", "opt-2.7b/results.json", "opt-2.7b/rust_model.ot", "notes.txt"):
            with open(source / name, "a", encoding="utf-8") as log:
                log.write("one more line\n")

    assert (convert_meanwhile(change).model / "model.safetensors").is_file()


def test_what_was_put_beside_the_language_model_since_then_makes_no_other_conversion(source_copy, tmp_path):
    source = source_copy(TWIN)
    before = api.convert(TWIN, source, output=tmp_path / "model").model / "blip2nb.json"
    stamp = before.stat().st_mtime_ns
    (source / "opt-2.7b" / "results.json").write_text("{}", encoding="utf-8")
    api.convert(TWIN, source, output=tmp_path / "model")
    assert before.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("name", ["opt-2.7b/vocab.json", "opt-2.7b/pytorch_model.bin"])
def test_what_is_read_may_not_change(convert_meanwhile, name, tmp_path):
    with pytest.raises(RequestError, match="changed while it was read"):
        convert_meanwhile(lambda source: os.utime(source / name))
    assert not (tmp_path / "model").exists()
