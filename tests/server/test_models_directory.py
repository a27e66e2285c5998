"""``--models-dir``: which names there are, and that a client reaches nothing else."""

from __future__ import annotations

import asyncio
import os
import sys

import pytest

pytest.importorskip("fastapi")

from exl.errors import ConfigError
from exl.server.directory import list_models
from exl.server.errors import ApiError
from exl.server.loading import Loader
from exl.server.models import Directory, Models


def add_model(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_folders_with_a_configuration_and_those_one_level_below(tmp_path):
    models = tmp_path / "models"
    for name in ("b", "a", "owner/c", "owner/d", ".hidden", "owner/.hidden", "owner/deep/e"):
        add_model(models / name)
    (models / "empty").mkdir()
    (models / "file.json").write_text("{}")
    assert list_models(models) == {name: models / name for name in ("a", "b", "owner/c", "owner/d")}
    add_model(models / "b" / "inside")  # a model's own folders are no models
    assert list(list_models(models)) == ["a", "b", "owner/c", "owner/d"]


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right there")
def test_links_are_followed_and_a_ring_of_them_ends(tmp_path):
    outside, models = add_model(tmp_path / "outside"), tmp_path / "models"
    models.mkdir()
    (models / "linked").symlink_to(outside)
    (models / "ring").symlink_to(models)
    (models / "broken").symlink_to(tmp_path / "nowhere")
    assert list(list_models(models)) == ["linked", "ring/linked"]


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes there")
def test_a_name_that_is_no_text_is_left_out(tmp_path):
    os.mkdir(os.fsencode(tmp_path) + b"/\xff")
    (tmp_path / os.fsdecode(b"\xff") / "config.json").write_text("{}")
    add_model(tmp_path / "good")
    assert list(list_models(tmp_path)) == ["good"]


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"models_dir: .*nowhere: No such file"):
        list_models(tmp_path / "nowhere")


def models_of(path, first=None):
    def make_loader(folder):
        loader = Loader()
        loader.folder = folder
        return loader

    name, loader = (None, None) if first is None else ("first", Loader())
    return Models(name, loader, directory=Directory(path, make_loader, first))


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc", "a/../../outside", "a/", "./a", "a\0", "", "A", "%2e%2e/outside", "\ud800", "a" * 10000],
)
def test_a_client_reaches_no_other_folder(tmp_path, name):
    add_model(tmp_path / "outside")
    for one in ("a", "b"):
        add_model(tmp_path / "models" / one)
    models = models_of(tmp_path / "models")
    with pytest.raises(ApiError) as caught:
        asyncio.run(models.named(name))
    assert caught.value.status == (404 if name else 400)
    assert "'a', 'b'" in caught.value.message


def test_folders_appear_and_vanish(tmp_path):
    add_model(tmp_path / "a")
    models = models_of(tmp_path)
    kept = models.find("a")
    assert models.default is kept  # the only one

    async def look():
        add_model(tmp_path / "b")
        found = await models.named("b")
        assert found.loader.folder == tmp_path / "b"
        assert models.find("a") is kept
        assert models.default is None
        with pytest.raises(ApiError, match="found no name, expected one of 'a', 'b'"):
            models.find(None)
        (tmp_path / "a" / "config.json").unlink()
        await models.refresh()
        assert [state.name for state in models.states] == ["b"]
        with pytest.raises(ApiError, match="found 'a', this server has 'b'"):
            await models.named("a")

    asyncio.run(look())


def test_a_directory_that_is_away_for_a_moment_takes_no_model_away(tmp_path):
    add_model(tmp_path / "models" / "a")
    models = models_of(tmp_path / "models")
    (tmp_path / "models").rename(tmp_path / "away")
    asyncio.run(models.refresh())
    assert [state.name for state in models.states] == ["a"]


def test_the_servers_own_model_is_not_listed_twice(tmp_path):
    for name in ("a", "b"):
        add_model(tmp_path / name)
    models = models_of(tmp_path, first=(tmp_path / "a").resolve())
    assert [state.name for state in models.states] == ["first", "b"]
    assert models.find("a") is models.find("first") is models.find(None)
