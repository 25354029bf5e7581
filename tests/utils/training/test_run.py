"""How a program ends: exit codes, and output that nobody reads."""

import os
import sys

import pytest

from utils.training.run import exit_code


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize(("arguments", "said"), [(["--help"], ""), ([], "nobody reads the output")])
def test_a_closed_pipe_ends_a_program_without_a_traceback(arguments, said, tmp_path):
    """As with | head: in a fork, whose output is a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    child = os.fork()
    if child == 0:
        with open(tmp_path / "stderr", "w") as errors:
            os.dup2(writing, 1)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), errors
            sys.argv[1:] = arguments

            def main(argv):
                print("a line of text")
                if argv:
                    raise SystemExit(0)
                return 0

            code = exit_code(main)
            sys.stdout.close()  # as Python's end does
        os._exit(code)
    os.close(writing)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    text = (tmp_path / "stderr").read_text()
    assert "Traceback" not in text and (said in text if said else text == "")
