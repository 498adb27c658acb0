"""Options for what comes out: saved files, sample pictures, logs, metadata."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, SecretStr

from sd_train.config.group import Group
from sd_train.config.values import FACTS, Accepted, FolderName, LaxPath


class SavingOptions(Group):
    """The saved files and the state from which a run is continued."""

    output_dir: LaxPath = Field(description="Folder for everything that the run writes.")
    output_name: str | None = Field(
        None, description="Name of the saved files without extension; not given: last, of an embedding its word."
    )
    overwrite: bool = Field(False, description="Replace the files of an earlier run of the same name in output_dir.")
    save_precision: Literal["float", "fp16", "bf16"] | None = Field(
        None, description="Precision of the saved weights; not given: float, and what was not trained as it was."
    )
    save_model_as: Literal["safetensors", "ckpt", "pt", "diffusers", "diffusers_safetensors"] | None = Field(
        None,
        description="Format of the saved files: networks and embeddings safetensors (also if not given), ckpt or pt; "
        "whole models safetensors, ckpt, or a folder as diffusers has it (if not given, as the model came).",
    )
    save_every_n_epochs: int | None = Field(None, ge=1, description="Save after every n-th epoch.")
    save_every_n_steps: int | None = Field(None, ge=1, description="Save after every n-th update.")
    save_n_epoch_ratio: int | None = Field(
        None, ge=1, description="Save so often that there are at least so many files, one an epoch at most; sets "
        "save_every_n_epochs.",
    )  # fmt: skip
    save_every_n_minutes: float | None = Field(
        None, gt=0, description="Save when so many minutes have passed since the last save."
    )
    save_last_n_epochs: int | None = Field(
        None, ge=1, description="Keep the files of so many epoch saves; older ones are deleted when a new one is whole."
    )
    save_last_n_epochs_state: int | None = Field(
        None, ge=1, description="The same of states; not given: save_last_n_epochs."
    )
    save_last_n_steps: int | None = Field(
        None, ge=1, description="Keep the files of the last so many updates (not: so many files)."
    )
    save_last_n_steps_state: int | None = Field(
        None, ge=1, description="The same of states; not given: save_last_n_steps."
    )
    save_state: bool = Field(False, description="Save, with each file, the state from which --resume continues.")
    save_state_on_train_end: bool = Field(False, description="Save that state when the training ends.")
    on_disk_full: Literal["wait", "stop"] = Field(
        "wait", description="What the end of the training does where its files find no room: wait until there is some "
        "(Ctrl-C gives up), or stop with exit code 4. Until then the training goes on, and saves when there is room.",
    )  # fmt: skip
    async_save: Literal["auto", "always", "never"] = Field(
        "auto", description="Train on while files are written, from a copy in memory: where it takes at most 1 GiB "
        "(auto), always, or never. The run's end and the next save wait for them.",
    )  # fmt: skip
    resume: str | None = Field(None, description="State folder to continue from, or: latest.")
    resume_anyway: Accepted = Field(
        (), description="Go on although these differ from what the state is of: " + ", ".join(FACTS) + "."
    )
    initial_step: int | None = Field(
        None, ge=1, le=10**9, description="Count so many updates as done: begin with the epoch that update lies in; "
        "with resume in place of the state's own place. The rates' curve goes on as it would without.",
    )  # fmt: skip
    initial_epoch: int | None = Field(
        None, ge=1, le=10**9, description="The same, as the epoch to begin with, from 1; initial_step goes before it."
    )
    skip_until_initial_step: bool = Field(
        False, description="Begin with that very update, not with its epoch's first."
    )


class SamplingOptions(Group):
    """Sample pictures made while the training goes on."""

    sample_every_n_steps: int | None = Field(None, ge=1, description="Make sample pictures after every n-th update.")
    sample_every_n_epochs: int | None = Field(None, ge=1, description="Make sample pictures after every n-th epoch.")
    sample_at_first: bool = Field(False, description="Make sample pictures before the first update too.")
    sample_prompts: LaxPath | None = Field(None, description="File with the prompts (.txt, .toml or .json).")
    sample_sampler: Literal[
        "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle",
        "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a",
    ] = Field("ddim", description="Sampler of the sample pictures.")  # fmt: skip


class LoggingOptions(Group):
    """Training curves and messages."""

    logging_dir: LaxPath | None = Field(None, description="Folder for the training curves; not given: no curves.")
    log_with: Literal["tensorboard", "jsonl", "wandb", "all"] | None = Field(
        None, description="Where curves go: TensorBoard's event file, metrics.jsonl (an object a line), wandb, or all "
        "of these, wandb if it is installed; not given: tensorboard if logging_dir is given.",
    )  # fmt: skip
    log_prefix: str | None = Field(None, description="Start of the name of the folder made in logging_dir.")
    log_tracker_name: FolderName = Field(
        None, description="Folder of the curves inside that one, and wandb's project; not given: network_train."
    )
    log_config: bool = Field(
        False, description="Give wandb the options too, without paths and keys; the curves in logging_dir have them in "
        "any case.",
    )  # fmt: skip
    log_tracker_config: LaxPath | None = Field(
        None, description="TOML file whose table wandb holds arguments of wandb.init (entity, tags, group, notes, ...)."
    )
    log_norms_every_n_steps: int = Field(
        10, ge=0, description="Log the norms of weights and gradients of each parameter group after every n-th update; "
        "0: never.",
    )  # fmt: skip
    wandb_run_name: str | None = Field(None, description="Name of the run in wandb; not given: wandb chooses one.")
    wandb_api_key: SecretStr | None = Field(
        None, description="Key of wandb; better kept in the variable WANDB_API_KEY or given to wandb login. It is "
        "written nowhere.",
    )  # fmt: skip


class HubOptions(Group):
    """Copies of what is saved, on the Hugging Face hub."""

    huggingface_repo_id: str | None = Field(
        None, description="Repository (owner/name) that every saved model is uploaded to; made where there is none."
    )
    huggingface_repo_type: Literal["model", "dataset", "space"] | None = Field(
        None, description="Kind of that repository; not given: model."
    )
    huggingface_path_in_repo: str | None = Field(None, description="Folder in it; not given: its top.")
    huggingface_token: SecretStr | None = Field(
        None, description="Token that may write there; better kept in the variable HF_TOKEN or given to hf auth login. "
        "It is written nowhere.",
    )  # fmt: skip
    huggingface_repo_visibility: Literal["public", "private"] | None = Field(
        None, description="Who sees a repository that is made; not given: private."
    )
    save_state_to_huggingface: bool = Field(False, description="Upload the states too that --save_state writes.")
    resume_from_huggingface: bool = Field(
        False, description="resume names a state on the hub: OWNER/NAME/PATH, with :REVISION and :TYPE behind it if "
        "need be.",
    )  # fmt: skip
    async_upload: bool = Field(False, description="Train on while files are uploaded; the run's end waits for them.")


class MetadataOptions(Group):
    """What the saved file says of itself."""

    metadata_title: str | None = Field(None, description="Title; not given: output_name.")
    metadata_author: str | None = Field(None, description="Author.")
    metadata_description: str | None = Field(None, description="Description.")
    metadata_license: str | None = Field(None, description="Licence.")
    metadata_tags: str | None = Field(None, description="Tags, separated by commas.")
    metadata_usage_hint: str | None = Field(None, description="How the file is meant to be used.")
    metadata_trigger_phrase: str | None = Field(None, description="Words that call what was learned.")
    metadata_merged_from: str | None = Field(None, description="Models that the base model was merged from.")
