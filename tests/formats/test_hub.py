"""SAEs go to the Hub and come back bit for bit, and each failure on the way has a clear message.

The Hub is a server of this machine that speaks the real one's HTTP interface (`tools/hub_server.py`).
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from sae_train import load
from sae_train.cli.export import run_command
from sae_train.errors import CheckpointError
from sae_train.formats.hub_files import units_of
from sae_train.formats.record import FILE
from sae_train.formats.registry import FORMATS, formats_that_hold
from sae_train.hub import address_of
from tools.exports import write_sae
from tools.hub_client import Client, client_of, digest
from tools.hub_routes import READER, TOKEN, Repo
from tools.hub_server import Hub


class Place(NamedTuple):
    """A server, a client of it, and SAEs on the disk."""

    hub: Hub
    client: Client
    one: Path
    """An SAE in our format."""
    two: Path
    """A run's directory with two SAEs, `a` and `b`."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("hub")
    write_sae(folder / "one")
    write_sae(folder / "two" / "saes" / "a", seed=1)
    write_sae(folder / "two" / "saes" / "b", seed=2, inference="topk", sparsifier="topk")
    with Hub().serving() as hub, client_of(hub.environment(folder / "home", token=None)) as client:
        yield Place(hub, client, folder / "one", folder / "two")


def pushed(place: Place, *arguments: object) -> None:
    done = place.client.export(*map(str, arguments), token=TOKEN)
    assert done.status == 0, done.stderr


def test_an_sae_in_our_format_comes_back_bit_for_bit(place: Place) -> None:
    pushed(place, place.one, "--push", "org/one")
    repo = place.hub.model("org/one")
    assert set(repo.files) == {".gitattributes", "README.md", "sae.json", "sae.safetensors", "sae_train.json"}
    assert not repo.is_private
    # weights took the way of large files, the header of small ones
    assert repo.files["sae.safetensors"] == (place.one / "sae.safetensors").read_bytes()
    assert list(place.hub.large.values()).count(repo.files["sae.safetensors"]) == 1
    assert repo.files["sae.json"] not in place.hub.large.values()
    loaded = place.client.load("hf://org/one")
    assert loaded.status == 0, loaded.stderr
    assert loaded.value[0] == digest(write_sae(place.one))
    assert place.client.load(f"hf://org/one@{repo.sha()}").value == loaded.value


@pytest.mark.parametrize("to", [[], ["--to", "saelens"]], ids=["ours", "saelens"])
def test_one_sae_of_a_suite_comes_back_bit_for_bit_and_alone(place: Place, to: list[str]) -> None:
    name = f"org/suite{len(to)}"
    pushed(place, place.two, *to, "--push", name, "--private")
    assert place.hub.model(name).is_private
    folder = "b" if to else "saes/b"
    expected = digest(write_sae(place.two / "saes" / "b", seed=2, inference="topk", sparsifier="topk"))
    place.hub.asked.clear()
    by_name = place.client.load(f"hf://{name}", "b", token=TOKEN)
    assert by_name.status == 0, by_name.stderr
    assert {str(Path(path).parent) for path in place.hub.downloads()} == {folder}
    by_folder = place.client.load(f"hf://{name}/{folder}", token=TOKEN)
    assert by_name.value[0] == by_folder.value[0] == expected
    unnamed = place.client.load(f"hf://{name}", token=TOKEN)
    assert unnamed.status == 2
    assert "holds 2 SAEs" in unnamed.stderr
    missing = place.client.load(f"hf://{name}", "c", token=TOKEN)
    assert (missing.status, missing.value) == (2, None)
    assert "holds no SAE 'c'" in missing.stderr


def test_a_suite_is_exported_from_the_hub_by_the_names_of_its_run(place: Place, tmp_path: Path) -> None:
    pushed(place, place.two, "--push", "org/again")
    done = place.client.export("hf://org/again", "--to", "saelens", "--out", str(tmp_path / "x"))
    assert done.status == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["a", "b", "suite.json"]
    one = place.client.load(str(tmp_path / "x"), "a").value
    assert one[0] == digest(write_sae(place.two / "saes" / "a", seed=1))


@pytest.mark.parametrize("to", [name for name in FORMATS if name != "openai"])
def test_every_format_comes_back_as_it_is_on_the_disk(place: Place, tmp_path: Path, to: str) -> None:
    able = [each for each in (place.two / "saes").iterdir() if to in formats_that_hold(load(each))]
    assert able
    for directory in able:
        repo = f"org/{to}-{directory.name}"
        pushed(place, directory, "--to", to, "--push", repo, "--out", tmp_path / directory.name, "--model", "org/model")
        check_same(place, tmp_path / directory.name, repo)
        # without its record an SAE is read as another program's is, whose layer may stand in the names of folders
        commits = place.hub.model(repo).commits
        commits.append({path: content for path, content in commits[-1].items() if not path.endswith(FILE)})
        next((tmp_path / directory.name).rglob(FILE)).unlink()
        check_same(place, tmp_path / directory.name, repo)


def check_same(place: Place, directory: Path, repo: str) -> None:
    local, fetched = place.client.load(str(directory)), place.client.load(f"hf://{repo}")
    assert (local.status, fetched.status) == (0, 0), fetched.stderr
    assert fetched.value == local.value


def test_a_layout_with_folders_of_its_own_is_found_by_the_names_of_its_suite(place: Place) -> None:
    pushed(place, place.two, "--to", "saelens", "--push", "org/deep")
    files = place.hub.model("org/deep").files
    moved = {path.replace("a/", "x/layer_2/"): content for path, content in files.items() if not path.startswith("b/")}
    moved["suite.json"] = files["suite.json"].replace(b'"path": "a"', b'"path": "x/layer_2"')
    place.hub.repos["model", "org/deep"] = Repo(commits=[moved | {"y/params.npz": b""}])
    loaded = place.client.load("hf://org/deep", "a")
    assert loaded.status == 0, loaded.stderr
    assert loaded.value == place.client.load("hf://org/deep/x").value


def test_a_later_upload_replaces_an_export_of_the_same_saes_and_nothing_else(place: Place) -> None:
    pushed(place, place.one, "--push", "org/mine", "--license", "mit")
    pushed(place, place.one, "--push", "org/mine", "--license", "apache-2.0")
    assert front_matter(place, "org/mine")["license"] == "apache-2.0"
    before = len(place.hub.model("org/mine").commits)
    for arguments in (
        [place.two, "--push"],
        [place.one, "--to", "saelens", "--push"],
        [place.two / "saes/a", "--push"],
    ):
        refused = place.client.export(*map(str, arguments), "org/mine", token=TOKEN)
        assert refused.status == 2
        assert "--push org/mine: holds " in refused.stderr
        assert "Choose another name." in refused.stderr
    place.hub.repos["model", "org/text"] = Repo(commits=[{"model.safetensors": b"x", "README.md": b"x"}])
    refused = place.client.export(str(place.one), "--push", "org/text", token=TOKEN)
    assert "holds something else than an earlier export of the same SAEs: model.safetensors." in refused.stderr
    assert len(place.hub.model("org/mine").commits) == before
    assert len(place.hub.model("org/text").commits) == 1


def test_nothing_is_pushed_where_an_sae_cannot_be_written(place: Place, tmp_path: Path) -> None:
    write_sae(tmp_path / "run" / "saes" / "a")
    write_sae(tmp_path / "run" / "saes" / "b")
    weights = tmp_path / "run" / "saes" / "b" / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    failed = place.client.export(str(tmp_path / "run"), "--push", "org/half", "--out", str(tmp_path / "x"), token=TOKEN)
    assert failed.status == 2
    assert "saes/b: not a readable SAE" in failed.stderr
    assert ("model", "org/half") not in place.hub.repos
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [
        ("org/new", None, "--push org/new: needs a token of the Hugging Face hub."),
        ("org/new", "hf_" + "0" * 34, "--push org/new: the Hugging Face hub does not accept this token."),
        ("org/new", READER, "there is no namespace 'org' in which the account 'me' may write with this token."),
        ("others/new", TOKEN, "there is no namespace 'others' in which the account 'me' may write"),
    ],
    ids=["no token", "invalid", "may only read", "another namespace"],
)
def test_an_upload_that_is_not_allowed_says_why(place: Place, repo: str, token: str | None, message: str) -> None:
    done = place.client.export(str(place.one), "--push", repo, token=token)
    assert done.status == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert ("model", repo) not in place.hub.repos


def test_a_download_that_is_not_possible_says_why(place: Place) -> None:
    weights = {"sae.safetensors": (place.one / "sae.safetensors").read_bytes(), "sae.json": b"{}"}
    place.hub.repos["model", "org/gated"] = Repo(commits=[weights], is_gated=True)
    place.hub.repos["model", "org/private"] = Repo(commits=[weights], is_private=True)
    place.hub.repos["model", "org/text"] = Repo(commits=[{"folder/model.safetensors": b"x"}])
    messages = {
        "hf://org/gated": "hf://org/gated: gated on the Hugging Face hub. Accept its terms",
        "hf://org/private": "the Hugging Face hub has no org/private, or it is private.",
        "hf://org/none": "the Hugging Face hub has no org/none, or it is private.",
        "hf://org/text": "hf://org/text: holds no file of an SAE",
        "hf://org/text/foldr": "org/text has no folder 'foldr'. Did you mean 'folder'?",
        "hf://org/text@v2": "the Hugging Face hub has no revision 'v2' of org/text.",
        "hf://text": "hf://text: not an address on the Hub.",
        "hf://org/text/../x": "hf://org/text/../x: not an address on the Hub.",
    }
    for address, message in messages.items():
        done = place.client.load(address)
        assert (done.status, done.value) == (2, None), address
        assert message in done.stderr, done.stderr


def test_without_a_network_the_cache_serves_and_the_rest_is_refused(place: Place, tmp_path: Path) -> None:
    pushed(place, place.one, "--push", "org/cached")
    online = place.client.load("hf://org/cached")
    assert online.status == 0, online.stderr
    with place.hub.unreachable():
        assert place.client.load("hf://org/cached").value == online.value
        other = place.client.load("hf://org/elsewhere")
        assert (other.status, other.value) == (2, None)
        assert "hf://org/elsewhere: not in the local cache, and the Hugging Face hub cannot be reached." in other.stderr
        done = place.client.export(str(place.one), "--push", "org/cached", "--out", str(tmp_path / "x"), token=TOKEN)
        assert (done.status, "the Hugging Face hub cannot be reached" in done.stderr) == (2, True)
        assert not (tmp_path / "x").exists()


def test_links_of_the_cache_lead_to_blobs_alone(tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--org--name"
    snapshot, blobs, shared = cache / "snapshots" / "abc", cache / "blobs", tmp_path / "hub" / "blobs"
    sae = write_sae(tmp_path / "sae")
    assert run_command([str(tmp_path / "sae"), "--to", "saelens", "--out", str(tmp_path / "out"), "--layer", "2"]) == 0
    for folder in (snapshot, blobs, shared):
        folder.mkdir(parents=True)
    for number, file in enumerate(sorted((tmp_path / "out").iterdir())):
        store = blobs if number else shared
        file.rename(store / file.name)
        (snapshot / file.name).symlink_to(store / file.name)
    with pytest.warns(UserWarning, match="model 'unknown'"):
        assert digest(load(snapshot)) == digest(sae)
    (tmp_path / "secret.json").write_text("{}")
    (snapshot / "secret.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointError, match=r"secret.json: is a link to .* outside of "):
        load(snapshot)


def front_matter(place: Place, name: str) -> dict[str, object]:
    card = place.hub.model(name).files["README.md"].decode()
    values = yaml.safe_load(io.StringIO(card.split("---\n")[1]))
    assert isinstance(values, dict)
    return values


def test_an_address_has_a_repository_a_revision_and_a_folder() -> None:
    address = address_of("hf://org/name@v1.0/a/b")
    assert (address.repo, address.revision, address.inside) == ("org/name", "v1.0", "a/b")
    address = address_of("hf://org/name/")
    assert (address.repo, address.revision, address.inside) == ("org/name", None, "")
    for wrong in (
        "hf://name",
        "hf:///name",
        "hf://org/name@",
        "hf://org//name",
        "hf://org/name/a/../b",
        "hf://org/na me",
    ):
        with pytest.raises(CheckpointError, match="not an address on the Hub"):
            address_of(wrong)


def test_the_units_of_a_repository_are_folders_or_single_files() -> None:
    assert units_of(["README.md", "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"]) == ["."]
    assert units_of(["a/ae.pt", "a/config.json", "b/ae.pt", "suite.json"]) == ["a", "b"]
    assert units_of(["q/layer0.sae.pt", "q/layer1.sae.pt"]) == ["q/layer0.sae.pt", "q/layer1.sae.pt"]
    assert units_of(["model-00001.safetensors", "config.json", "pytorch_model.bin"]) == []
