"""What is committed beside the notebooks is what their sources say. They are executed by `make notebooks`."""

import json
import re
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext")

pytestmark = pytest.mark.newest  # files

FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("[0-9]_*.py"))
LINK = re.compile(r"\]\((?!https?:)([^)#]+)[^)]*\)")


def source(name):
    return (FOLDER / f"{name}.py").read_text()


def notebook(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text())


def outputs(name):
    return [output for cell in notebook(name)["cells"] for output in cell.get("outputs", [])]


def test_every_notebook_has_both_files():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)
    assert {"1_one_shot", "2_gradual", "3_at_init"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_those_of_the_source(name):
    wanted = [(cell.cell_type, cell.source) for cell in jupytext.read(FOLDER / f"{name}.py", fmt="py:percent").cells]
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook(name)["cells"]]
    assert found == wanted, f"run python notebooks/execute.py {name}"


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_light_clean_and_of_one_run(name):
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 300_000
    assert {output["output_type"] for output in outputs(name)} <= {"stream", "display_data", "execute_result"}
    assert any("image/png" in output.get("data", {}) for output in outputs(name))
    assert "stderr" not in {output.get("name") for output in outputs(name)}  # where warnings are printed
    texts = json.dumps([output.get("text", output.get("data", {}).get("text/plain", "")) for output in outputs(name)])
    assert not re.search(r"/(home|root|tmp|work|usr|opt|Users)/", texts)
    code = [cell for cell in notebook(name)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))


@pytest.mark.parametrize("name", NAMES)
def test_opens_and_installs_where_woodjax_is_not(name):
    cells = [cell.source for cell in jupytext.read(FOLDER / f"{name}.py", fmt="py:percent").cells]
    address = f"https://colab.research.google.com/github/woodjax/woodjax/blob/main/notebooks/{name}.ipynb"
    assert f"[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]({address})" in cells[0]
    assert '"google.colab" in sys.modules' in cells[1]
    [install] = re.findall(r"^ +%pip install .*$", cells[1], flags=re.MULTILINE)  # a magic again, no comment
    assert "github.com/woodjax/woodjax" in install
    assert sum("%pip" in cell for cell in cells) == 1


@pytest.mark.parametrize("name", NAMES)
def test_has_small_sizes_a_seed_and_claims_that_can_fail(name):
    assert 'SMALL = bool(int(os.environ.get("WOODJAX_SMALL", "0")))' in source(name)
    assert re.search(r"^SEED = 0$", source(name), flags=re.MULTILINE)
    assert len(re.findall(r"^ *assert ", source(name), flags=re.MULTILINE)) >= 3
    assert "float64" not in re.sub(r"np\.float64", "", source(name))  # accelerators have none
    assert "tensorflow" not in source(name).replace("tensorflow_datasets", "")


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files(name):
    targets = {target for line in source(name).splitlines() if line.startswith("#") for target in LINK.findall(line)}
    assert not [target for target in targets if not (FOLDER / target).exists()]
