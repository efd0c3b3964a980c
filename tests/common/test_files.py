import os

import pytest

from diffoundry.common.errors import DiffoundryError
from diffoundry.common.files import write_json


def test_a_pipe_is_not_replaced_by_a_file(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(DiffoundryError, match="is a device or a pipe"):
        write_json(pipe, {})
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]
