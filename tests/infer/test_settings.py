"""Sampling settings of `generate` and `chat`: an option, else the model folder, else a default."""

import json
import types
import warnings

import numpy as np
import pytest

from hunyuan_jax import cli
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.infer import text
from hunyuan_jax.infer.settings import DEFAULTS, Sampling, read_sampling
from hunyuan_jax.storage import Place

STATED = {
    "max_new_tokens": 30,
    "min_new_tokens": 3,
    "temperature": 0.7,
    "top_k": 5,
    "top_p": 0.6,
    "min_p": 0.02,
    "repetition_penalty": 1.05,
}
GIVEN = {
    "max_new_tokens": 20,
    "min_new_tokens": 2,
    "temperature": 0.1,
    "top_k": 7,
    "top_p": 0.5,
    "min_p": 0.03,
    "repetition_penalty": 1.2,
}


@pytest.fixture
def used(monkeypatch, tmp_path):
    """Runs `generate` on a folder with these settings; returns those that reach the model."""

    def run(stated, *options):
        if stated is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(stated))
        given = []

        class Model:
            model = types.SimpleNamespace(engine=types.SimpleNamespace(close=lambda: None))

            def stream(self, prompt, sampling):
                given.append(sampling)
                return iter(())

        monkeypatch.setattr(text, "load", lambda *_, **__: Model())
        assert cli.run(["generate", f"--checkpoint={tmp_path}", "--prompt=x", *options]) == 0
        with warnings.catch_warnings(action="ignore"):
            resolved = given[0].resolved(read_sampling(Place(tmp_path)))
        return {name: getattr(resolved, name) for name in DEFAULTS}

    return run


def test_settings_that_act_are_not_warned_of(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(STATED))
    with warnings.catch_warnings(action="error"):
        assert read_sampling(Place(tmp_path)) == STATED


def test_without_a_file_the_defaults_hold(used):
    assert used(None) == DEFAULTS


def test_the_folder_goes_before_the_defaults(used):
    assert used(STATED) == STATED
    assert used({"top_p": 0.6}) == DEFAULTS | {"top_p": 0.6}


@pytest.mark.parametrize("name", GIVEN)
def test_an_option_goes_before_the_folder(used, name):
    assert used(STATED, f"--{name}={GIVEN[name]}") == STATED | {name: GIVEN[name]}


def test_an_option_that_says_the_default_is_given_too(used):
    options = [f"--{name}={DEFAULTS[name]}" for name in GIVEN]
    assert used(STATED, *options) == STATED | {name: DEFAULTS[name] for name in GIVEN}


def test_greedy_folders_and_top_k_off(used):
    assert used({"do_sample": False, "temperature": 0.7})["temperature"] == 0.0
    assert used({"do_sample": True, "temperature": 0.7})["temperature"] == 0.7
    assert used({"top_k": -1})["top_k"] == 0
    assert used({"top_k": None, "temperature": None}) == DEFAULTS


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ('{"temperature": -1}', "temperature = -1 must be a number that is not negative"),
        ('{"temperature": "hot"}', "temperature = 'hot' must be a number"),
        ('{"temperature": NaN}', "temperature = nan must be a number"),
        ('{"top_k": 2.5}', "top_k = 2.5 must be an integer"),
        ('{"top_p": 0}', r"top_p = 0 must be in \(0, 1\]"),
        ('{"repetition_penalty": 0}', "repetition_penalty = 0 must be a positive number"),
        ('{"repetition_penalty": 1e39}', r"repetition_penalty = 1e\+39 must be at most 1e\+20"),
        ('{"max_new_tokens": 0}', "max_new_tokens = 0 must be an integer of at least 1"),
        ('{"do_sample": "false"}', "do_sample = 'false' must be true or false"),
        ("[]", "must be an object of fields"),
        ("{", "is not valid JSON"),
    ],
)
def test_a_bad_file_is_named(tmp_path, stated, message):
    (tmp_path / "generation_config.json").write_text(stated)
    with pytest.raises(ConfigError, match=rf"generation_config\.json.*{message}"):
        read_sampling(Place(tmp_path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0 must be an integer of at least 1"),
        ({"seed": None}, "seed = None must be an integer"),
        ({"temperature": -1}, "temperature = -1 must be a number that is not negative; 0 is"),
        ({"temperature": float("nan")}, "temperature = nan must be a number"),
        ({"temperature": float("inf")}, "temperature = inf must be finite"),
        ({"temperature": 1e39}, r"temperature = 1e\+39 must be at most 1e\+20 in size"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty = 1e-40 must be a positive number of"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty = inf must be finite"),
        ({"logit_bias": {1: -1e39}}, r"logit_bias of 1 = -1e\+39 must be at most 1e\+20 in size"),
        ({"top_k": 2.5}, "top_k = 2.5 must be an integer"),
        ({"top_p": 0}, r"top_p = 0 must be in \(0, 1\]; 1 is off"),
        ({"repetition_penalty": "a lot"}, "repetition_penalty = 'a lot' must be a positive"),
        ({"seed": True}, "seed = True must be an integer"),
        ({"min_new_tokens": -1}, "min_new_tokens = -1 must be an integer that is not negative"),
        ({"min_p": 1.5}, r"min_p = 1.5 must be in \[0, 1\]; 0 is off"),
        ({"presence_penalty": float("inf")}, "presence_penalty = inf must be finite"),
        ({"frequency_penalty": "no"}, "frequency_penalty = 'no' must be a number"),
        ({"logprobs": 21}, "logprobs = 21 must be 0 to 20"),
        ({"prompt_logprobs": -1}, "prompt_logprobs = -1 must be 0 to 20"),
        ({"logit_bias": {-1: 2.0}}, r"logit_bias = \{-1: 2.0\} must map token ids, none of them"),
        ({"logit_bias": 3}, "logit_bias = 3 must map token ids"),
        ({"logit_bias": {1: "x"}}, "logit_bias of 1 = 'x' must be a number"),
        ({"stop_ids": "2"}, "stop_ids = '2' must be token ids"),
        ({"stop_ids": [2, -3]}, r"stop_ids = \[2, -3\] must be token ids, integers from 0"),
        ({"stop_ids": 2**31}, "stop_ids = 2147483648 must be token ids, integers from 0 to"),
        ({"stop_ids": [2.0]}, r"stop_ids = \[2.0\] must be token ids"),
    ],
)
def test_a_bad_setting_is_named_when_it_is_built(fields, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**fields)


def test_what_32_bits_cannot_tell_from_its_limit_is_the_limit(tmp_path):
    for tiny in (1e-40, 5e-324, 9e-7):
        assert Sampling(temperature=tiny).temperature == 0
    assert Sampling(temperature=1e-6).temperature == 1e-6
    assert Sampling(top_p=1 - 1e-12).top_p == 1
    assert Sampling(top_k=2**40).top_k == 2**31 - 1  # above any vocabulary: off
    assert Sampling(top_p=1 - 1e-6).top_p == 1 - 1e-6
    (tmp_path / "generation_config.json").write_text('{"temperature": 1e-40, "top_p": 1e-40}')
    assert read_sampling(Place(tmp_path)) == {"temperature": 0, "top_p": 1e-40}


def test_what_the_folder_states_and_is_not_implemented_is_named(tmp_path):
    file = tmp_path / "generation_config.json"
    file.write_text('{"num_beams": 4, "typical_p": 1.0, "no_repeat_ngram_size": 3, "top_k": 5}')
    with pytest.warns(UserWarning, match=r"no_repeat_ngram_size = 3, num_beams = 4: not impl"):
        assert read_sampling(Place(tmp_path)) == {"top_k": 5}
    file.write_text('{"num_beams": 1, "typical_p": 1.0, "stop_strings": null, "max_length": 20}')
    assert read_sampling(Place(tmp_path)) == {}  # without a warning, which would be an error


def test_numbers_of_numpy_are_numbers():
    sampling = Sampling(max_new_tokens=np.int64(3), top_p=np.float32(0.5), stop_ids=np.int32(7))
    assert sampling == Sampling(max_new_tokens=3, top_p=0.5, stop_ids=(7,))
    assert Sampling(logit_bias={np.int64(3): 1}).logit_bias == ((3, 1.0),)
