"""Files in a local storage are whole or absent."""

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.fs
import pytest

from raybilevel._cluster.local_files import WholeFile, local_filesystem


def test_a_folder_is_copied_there_and_read_back(tmp_path: Path) -> None:
    (tmp_path / "from" / "deep").mkdir(parents=True)
    (tmp_path / "from" / "deep" / "large").write_bytes(os.urandom(3_000_000))
    (tmp_path / "from" / "empty").touch()
    filesystem = pickle.loads(pickle.dumps(local_filesystem()))
    pyarrow.fs.copy_files(
        str(tmp_path / "from"),
        str(tmp_path / "to"),
        source_filesystem=pyarrow.fs.LocalFileSystem(),
        destination_filesystem=filesystem,
    )
    copied = sorted(path.relative_to(tmp_path / "to") for path in (tmp_path / "to").rglob("*"))
    assert copied == [Path("deep"), Path("deep/large"), Path("empty")]
    assert (tmp_path / "to/deep/large").read_bytes() == (tmp_path / "from/deep/large").read_bytes()
    with filesystem.open_input_file(str(tmp_path / "to/deep/large")) as file:
        assert file.size() == 3_000_000


def test_a_file_appears_when_it_is_closed_and_not_before(tmp_path: Path) -> None:
    target = tmp_path / "state"
    target.write_bytes(b"old")
    file = local_filesystem().open_output_stream(str(target))
    file.write(b"new")
    assert target.read_bytes() == b"old"
    file.close()
    assert target.read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_file_that_nobody_closes_never_appears(tmp_path: Path) -> None:
    file = local_filesystem().open_output_stream(str(tmp_path / "state"))
    file.write(b"half")
    del file
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk without space")
def test_a_full_disk_is_an_error_and_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "state"
    target.write_bytes(b"old")
    file = WholeFile(str(target))
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, file.fileno())
    os.close(full)
    with pytest.raises(OSError, match="No space left"):
        file.write(b"new")
    file.close()
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_writer_that_is_killed_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "state.json"
    target.write_bytes(b"old")
    program = (
        "import sys, time\n"
        "from raybilevel._cluster.local_files import WholeFile\n"
        "file = WholeFile(sys.argv[1]); file.write(b'new'); print('written', flush=True); time.sleep(600)"
    )
    writer = subprocess.Popen([sys.executable, "-c", program, str(target)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    with writer.stdout:
        assert writer.stdout.readline() == b"written\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.glob("*.json")] == ["state.json"]
