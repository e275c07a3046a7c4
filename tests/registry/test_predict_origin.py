"""Predictions of a registered model are signed with the version that was asked, whoever bears the alias later."""

from dataclasses import replace

import pytest

from raymed.config import UserError
from raymed.registry.card import write_card
from raymed.registry.register import add
from raymed.results.predict import load_origin


def test_an_alias_becomes_its_version(bundle, client, place, tmp_path):
    for number in (1, 2):
        folder = replace(bundle, operating_point=bundle.operating_point | {"threshold": number / 4}).save(
            tmp_path / str(number)
        )
        write_card(folder, "m")
        add(client, folder, "m")
    client.set_registered_model_alias("m", "champion", "1")
    where = place["tracking"], str(place["storage"])
    loaded, champion = load_origin("models:/m@champion", *where)
    assert (champion.model, champion.version, loaded.operating_point["threshold"]) == ("m", "1", 0.25)
    later, second = load_origin("models:/m/2", *where)
    assert (second.model, second.version, later.operating_point["threshold"]) == ("m", "2", 0.5)
    _, of_folder = load_origin(str(tmp_path / "2"), *where)
    assert (of_folder.model, of_folder.version) == ("tune-1/final", "")
    assert of_folder.bundle == second.bundle != champion.bundle
    for unknown in ("models:/m@nobody", "models:/n@champion", "models:/m/3"):
        with pytest.raises(UserError, match="nobody|'n'|version 3"):
            load_origin(unknown, *where)
