"""A run goes on with the source that it began with, by the facts that its version recorded."""

from pathlib import Path

import pytest

from sae_train.errors import CheckpointError
from sae_train.training.provenance import check_source

RECORD = {"model": "m", "revision": "abc", "prepends_bos": True}


@pytest.mark.parametrize("known", [["model"], ["model", "revision"], list(RECORD), []])
def test_facts_that_an_older_version_did_not_record_are_no_change(known: list[str]) -> None:
    check_source(RECORD, stored={"source": {key: RECORD[key] for key in known}}, path=Path("run"))


@pytest.mark.parametrize("key", RECORD)
def test_another_source_is_refused_by_the_fact_that_differs(key: str) -> None:
    with pytest.raises(CheckpointError, match=f"{key} 'other' ->"):
        check_source(RECORD, stored={"source": RECORD | {key: "other"}}, path=Path("run"))
