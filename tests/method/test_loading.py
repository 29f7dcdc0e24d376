"""Loading generators of several families, from folders and single files; what is missing or damaged is one sentence."""

import io
import json
import os
import shutil
import subprocess
import sys

import diffusers
import httpx
import numpy as np
import pytest
import sentencepiece
import tiny_loading
import torch
from accelerate import PartialState
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file, save_file
from tiny_pipelines import clip_tokenizer

from diffseg.adapters import find_lora
from diffseg.errors import DiffsegError
from diffseg.generator import load_generator, load_tokenizer, offload_pipeline, takes_dpm
from diffseg.paths import locate
from diffseg.segmenters import load_segmenter


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of the tiny pipelines, each written when it is first asked for."""
    root, made = tmp_path_factory.mktemp("generators"), {}

    def folder(family: str):
        if family not in made:
            made[family] = root / family
            tiny_loading.build(family).save_pretrained(made[family])
        return made[family]

    return folder


@pytest.fixture
def sd1(folders, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(folders("sd1"), tmp_path / "sd1")


@pytest.mark.parametrize("family", tiny_loading.FAMILIES)
def test_every_family_draws_what_it_drew_before_saving(folders, family):
    pipeline = load_generator(str(folders(family)), scheduler="own")
    built = tiny_loading.build(family)
    assert type(pipeline) is type(built)
    assert type(pipeline.scheduler) is type(built.scheduler)
    assert np.abs(tiny_loading.picture(pipeline) - tiny_loading.picture(built)).max() < 1e-5
    assert len(load_tokenizer(str(folders(family)))) == len(built.tokenizer)


@pytest.mark.parametrize("family", tiny_loading.FAMILIES)
def test_only_diffusion_models_that_are_not_distilled_get_the_second_order_solver(folders, family):
    own = type(tiny_loading.build(family).scheduler)
    loaded = load_generator(str(folders(family))).scheduler
    if family in ("sd1", "sdxl", "pixart", "hunyuan"):
        assert type(loaded) is DPMSolverMultistepScheduler
        assert (loaded.config.algorithm_type, loaded.config.solver_order) == ("dpmsolver++", 2)
    else:
        assert type(loaded) is own


def test_schedulers_that_keep_their_place():
    zero_snr = dict(timestep_spacing="trailing", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert takes_dpm(diffusers.EulerDiscreteScheduler(**zero_snr))  # trailing, but not distilled
    assert takes_dpm(DPMSolverMultistepScheduler(timestep_spacing="trailing"))  # the same solver
    for own in (
        diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing"),
        diffusers.TCDScheduler(),
        diffusers.EDMEulerScheduler(),
        diffusers.SCMScheduler(),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ):
        assert not takes_dpm(own)


def test_timesteps_are_the_files_own_or_counted_from_either_end():
    """Eight parts of 1000 down from the last timestep, or nine up from 0 without the first, plus steps_offset."""
    down, up = [125 * k - 1 for k in range(8, 0, -1)], [111 * k + 1 for k in range(8, 0, -1)]
    expected = {"own": down, "dpm++": down, "dpm++ trailing": down, "dpm++ leading": up}  # the file says trailing
    for name, timesteps in expected.items():
        scheduler = load_generator("mini", scheduler=name).scheduler
        scheduler.set_timesteps(8)
        assert scheduler.timesteps.tolist() == timesteps


def test_timesteps_that_the_files_leave_to_their_schedulers_class_stay(sd1):
    """Stable Diffusion 1.x names no timestep_spacing: PNDM's own is "leading", DPM-Solver's another."""
    file = sd1 / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    assert config.pop("timestep_spacing") == "leading"
    file.write_text(json.dumps(config))
    for name, spacing in {"dpm++": "leading", "dpm++ trailing": "trailing"}.items():
        assert load_generator(str(sd1), scheduler=name).scheduler.config.timestep_spacing == spacing


def test_a_tokenizer_that_is_a_sentencepiece_model_alone(folders, tmp_path):
    """As PixArt's and the first T5s have it."""
    folder = shutil.copytree(folders("pixart"), tmp_path / "pixart")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    model, marks = io.BytesIO(), dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat on grass"]), model_writer=model, vocab_size=12, minloglevel=2, **marks
    )
    (folder / "tokenizer" / "spiece.model").write_bytes(model.getvalue())
    ids = [*sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).encode("grass on a cat"), 1]
    for tokenizer in (load_generator(str(folder)).tokenizer, load_tokenizer(str(folder))):
        assert tokenizer("grass on a cat").input_ids == ids


def test_half_precision_and_offload_on_a_cpu_are_said_and_not_done(folders, capsys):
    for precision in ("fp16", "bf16"):
        pipeline = load_generator(str(folders("sd1")), precision=precision)
        assert pipeline.dtype == torch.float32
        assert f"{precision} is much slower than fp32 on a CPU" in capsys.readouterr().out
    load_generator(str(folders("sd1")), offload="model")
    assert "no GPU to offload from" in capsys.readouterr().out


@pytest.mark.parametrize("offload", ["model", "group"])
@pytest.mark.parametrize("family", ["sd1", "pixart", "flux"])
def test_offload_changes_no_picture(folders, family, offload):
    """On a GPU if there is one; else diffusers' hooks move weights from the CPU to the CPU."""
    device = PartialState().device
    pipeline = load_generator(str(folders(family)), device)
    plain = tiny_loading.picture(pipeline)
    pipeline = load_generator(str(folders(family)))
    offload_pipeline(pipeline, device, offload)
    assert pipeline._execution_device.type == device.type
    assert np.abs(tiny_loading.picture(pipeline) - plain).max() < 1e-5


def test_a_variant_of_the_weights(folders, tmp_path):
    half = load_generator(str(folders("sd1"))).to(torch.float16)
    half.save_pretrained(tmp_path, variant="fp16")
    assert load_generator(str(tmp_path), variant="fp16").dtype == torch.float32  # whatever the file holds
    with pytest.raises(DiffsegError, match=r"weights of the variant fp16 only; set generator_variant=fp16"):
        load_generator(str(tmp_path))
    with pytest.raises(DiffsegError, match="no weights of the variant 'ema'; set generator_variant"):
        load_generator(str(folders("sd1")), variant="ema")


def test_weights_in_several_files(sd1):
    weights = load_file(sd1 / "unet" / "diffusion_pytorch_model.safetensors")
    size = sum(value.nbytes for value in weights.values())
    shutil.rmtree(sd1 / "unet")
    pipeline = tiny_loading.build("sd1")
    pipeline.unet.save_pretrained(sd1 / "unet", max_shard_size=size // 2)
    assert (
        np.abs(tiny_loading.picture(load_generator(str(sd1), scheduler="own")) - tiny_loading.picture(pipeline)).max()
        < 1e-5
    )
    last = sorted((sd1 / "unet").glob("*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(DiffsegError, match=rf"{last.name} is missing, which .*index.json names; copy or download"):
        load_generator(str(sd1))


# ---------------------------------------------------------------------------------------------------- single files


def test_a_single_file_is_loaded_with_the_configuration_that_lies_beside_it(folders, tmp_path, monkeypatch):
    save_file({"some.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    shutil.copytree(folders("sdxl"), tmp_path / "model")
    calls = []

    def from_single_file(cls, path, **options):
        calls.append((cls.__name__, path, options["config"]))
        return cls.from_pretrained(options["config"])

    monkeypatch.setattr(diffusers.loaders.FromSingleFileMixin, "from_single_file", classmethod(from_single_file))
    load_generator(str(tmp_path / "model.safetensors"))
    assert calls == [("StableDiffusionXLPipeline", str(tmp_path / "model.safetensors"), str(tmp_path / "model"))]
    assert len(load_tokenizer(str(tmp_path / "model.safetensors"))) == len(clip_tokenizer())


def test_single_files_that_cannot_be_loaded(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(diffusers.configuration_utils, "hf_hub_download", offline)
    model = tmp_path / "model.safetensors"
    save_file({"some.weight": torch.zeros(1)}, model)
    for load in (load_generator, load_tokenizer):
        with pytest.raises(DiffsegError, match=f"copy that repository's folder, .*, to {tmp_path / 'model'}"):
            load(str(model))
    shutil.copytree(folders("pixart"), tmp_path / "model")
    with pytest.raises(DiffsegError, match="cannot load PixArtSigmaPipeline from one file; give its folder or hub id"):
        load_generator(str(model))
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(folders("sd1"), tmp_path / "model")
    with pytest.raises(DiffsegError, match="model.safetensors does not hold all of a StableDiffusionPipeline; give"):
        load_generator(str(model))  # as with a file that is no generator
    (tmp_path / "model.ckpt").write_bytes(b"pickled")
    with pytest.raises(DiffsegError, match="model.ckpt is no .safetensors file"):
        load_generator(str(tmp_path / "model.ckpt"))


def test_a_single_file_of_the_denoiser_alone(folders, tmp_path):
    """As flux1-dev.safetensors is."""
    folder, file = shutil.copytree(folders("flux"), tmp_path / "model"), tmp_path / "model.safetensors"
    shutil.copy(folder / "transformer" / "diffusion_pytorch_model.safetensors", file)
    with pytest.raises(DiffsegError, match="does not hold all of a FluxPipeline; give the folder or hub id of the"):
        load_generator(str(file))


def offline(*_, **__):
    raise OSError("no network")


# ---------------------------------------------------------------------------------------------------------- damage

UNET = "unet/diffusion_pytorch_model.safetensors"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3438167534\n"


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pickle(path):
    path.rename(path.with_suffix(".bin"))


@pytest.mark.parametrize(
    ("file", "damage", "sentence"),
    [
        (UNET, halve, r"diffusion_pytorch_model.safetensors is damaged \(\d+ bytes: .*\); copy or download it again"),
        (UNET, lambda path: path.write_text(LFS), "safetensors is a Git LFS pointer, .*; run git lfs pull"),
        (UNET, pickle, "holds diffusion_pytorch_model.bin but no .safetensors; only safetensors are read"),
        (UNET, os.remove, "unet holds no .safetensors; only safetensors are read"),
        ("text_encoder", shutil.rmtree, "lacks the folder text_encoder that its model_index.json names"),
        ("vae/config.json", halve, "vae/config.json is damaged"),
        ("model_index.json", halve, "model_index.json is damaged"),
        ("model_index.json", os.remove, "has no model_index.json; give the folder of a whole pipeline"),
        ("tokenizer/tokenizer.json", halve, "tokenizer.json is damaged"),
        ("tokenizer/tokenizer.json", os.remove, "tokenizer holds no vocabulary"),
        ("tokenizer/tokenizer.json", lambda path: path.write_text(LFS), "tokenizer.json is a Git LFS pointer"),
        ("tokenizer/tokenizer.json", lambda path: path.write_text("{}"), r"cannot be loaded from .*; download or save"),
        ("scheduler/scheduler_config.json", os.remove, "cannot be loaded from .*; download or save it again"),
    ],
)
def test_damage_is_one_sentence_that_names_the_file(sd1, file, damage, sentence):
    damage(sd1 / file)
    loaders = (load_generator, load_tokenizer) if file.startswith("tokenizer") else (load_generator,)
    for load in loaders:
        with pytest.raises(DiffsegError, match=sentence) as caught:
            load(str(sd1))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_weights_of_another_shape_and_lost_weights(sd1):
    weights = load_file(sd1 / UNET)
    save_file({key: value for key, value in weights.items() if "conv_in" not in key}, sd1 / UNET)
    with pytest.raises(DiffsegError, match="cannot be loaded from .*conv_in"):
        load_generator(str(sd1))
    save_file(weights | {"conv_in.weight": torch.zeros(3, 3)}, sd1 / UNET)
    with pytest.raises(DiffsegError, match="cannot be loaded from .*conv_in"):
        load_generator(str(sd1))


def test_names_that_stand_for_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    for load in (load_generator, load_tokenizer):
        with pytest.raises(DiffsegError, match="does not exist and is no hub id such as owner/name"):
            load(str(tmp_path / "nowhere"))
        with pytest.raises(DiffsegError, match="has no model_index.json|holds no vocabulary"):
            load(str(tmp_path / "empty"))
    with pytest.raises(DiffsegError, match="no generator_offload 'half'; choose one of none, model, group, sequential"):
        load_generator("mini", offload="half")
    with pytest.raises(DiffsegError, match="no generator_scheduler 'ddim'; choose one of"):
        load_generator("mini", scheduler="ddim")


def test_a_wrong_hub_id_offline():
    """In a process of its own, as the hub's client reads the variable when it is imported."""
    code = """
from diffseg.errors import DiffsegError
from diffseg.generator import load_generator, load_tokenizer
for load in load_generator, load_tokenizer:
    try:
        load("owner/nothing")
    except DiffsegError as error:
        print(error)
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert len(said) == 2 and all(line.startswith("the generator 'owner/nothing' cannot be loaded") for line in said)
    assert all(line.endswith("give a local folder in diffusers' layout or a .safetensors file") for line in said)


def test_code_of_a_repository_is_never_run(sd1, tmp_path):
    (sd1 / "pipeline.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Own: pass\n")
    index = json.loads((sd1 / "model_index.json").read_text())
    (sd1 / "model_index.json").write_text(json.dumps(index | {"_class_name": ["pipeline", "Own"]}))
    with pytest.raises(DiffsegError, match="cannot be loaded from"):
        load_generator(str(sd1))
    assert not (tmp_path / "run").exists()


def test_without_a_clone_relative_paths_count_from_the_working_directory(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSEG_ROOT", str(tmp_path))  # no notebooks folder in it
    monkeypatch.chdir(folders("sd1").parent)
    assert locate("generator", "sd1") == folders("sd1")
    assert isinstance(load_generator("sd1"), StableDiffusionPipeline)
    assert load_generator("mini").unet.config.in_channels == 8


@pytest.mark.parametrize("load", [load_tokenizer, load_generator, find_lora, load_segmenter])
def test_a_licence_to_accept_is_named(load, monkeypatch):
    def refuse(*_, **__):
        raise GatedRepoError("401 Client Error", response=httpx.Response(401, request=httpx.Request("GET", "http://x")))

    monkeypatch.setattr("diffseg.generator.snapshot_download", refuse)
    monkeypatch.setattr("diffseg.adapters.snapshot_download", refuse)
    monkeypatch.setattr("diffseg.segmenters.snapshot_download", refuse)
    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", refuse)
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", refuse)
    with pytest.raises(DiffsegError, match="accept its licence on its page of the hub and log in with `hf auth login`"):
        load("somebody/gated")
