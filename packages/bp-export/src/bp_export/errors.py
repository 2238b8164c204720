"""What can go wrong with an export, as coded errors.

    UserError (bp_runs)
    ├── BaseModelNotFoundError       INPUT_EXPORT_BASE_NOT_FOUND          no base model folder on this machine
    ├── ModelInvalidError            INPUT_EXPORT_MODEL_INVALID           config.json or a tensor is missing or wrong
    ├── ArchitectureUnsupportedError INPUT_EXPORT_ARCHITECTURE            no GGUF layout for this kind of model
    ├── TokenizerUnsupportedError    INPUT_EXPORT_TOKENIZER               not a byte-level BPE, or damaged
    ├── PreTokenizerUnknownError     INPUT_EXPORT_PRE_TOKENIZER           its splitting rule is not in the table
    ├── QuantizationUnknownError     INPUT_EXPORT_QUANTIZATION            no such quantization, or not for this format
    ├── AdapterFormatError           INPUT_EXPORT_ADAPTER_FORMAT          the format cannot say what the adapter does
    ├── TemplateChangedError         INPUT_EXPORT_TEMPLATE_CHANGED        chats render differently than at training
    ├── ImportanceInvalidError       INPUT_EXPORT_IMPORTANCE              the importance matrix is damaged or another's
    ├── OutputTakenError             INPUT_EXPORT_OUTPUT_TAKEN            something is where the output should go
    ├── OllamaNameTakenError         INPUT_OLLAMA_NAME_TAKEN              Ollama has a model of that name
    ├── ChatTargetError              INPUT_CHAT_TARGET                    there is nothing of that name to talk to
    ├── PushSourceError              INPUT_HUB_PUSH_SOURCE                nothing that can be pushed, or with a secret
    ├── PushRepoInvalidError         INPUT_HUB_PUSH_INVALID_REPO          no such name can be on the Hub
    ├── PushRepoTakenError           INPUT_HUB_PUSH_REPO_TAKEN            the repository has files already
    └── PushDeniedError              INPUT_HUB_PUSH_DENIED                no token, or one that may not write there
    DependencyError (bp_runs)
    ├── GgmlMissingError             DEP_GGML_MISSING                     ggml's library is not installed or not whole
    ├── LlamaCppMissingError         DEP_LLAMA_CPP_MISSING                the extra `verify` is not installed
    ├── ConverterMissingError        DEP_LLAMA_CPP_CONVERTER              llama.cpp's converter can't be installed
    ├── HubMissingError              DEP_HUB_MISSING                      the extra `hub` is not installed
    ├── PushNetworkError             DEP_HUB_PUSH_NETWORK                 the Hub does not answer
    ├── PushRefusedError             DEP_HUB_PUSH_REFUSED                 the Hub rejects for another reason
    └── OllamaRegistrationError      DEP_OLLAMA_REGISTRATION_FAILED       Ollama is away or rejects
    PartialError (bp_runs)
    ├── ParityFailedError            PARTIAL_EXPORT_PARITY_FAILED         the export does not say what the model says
    └── ParityNotTestedError         PARTIAL_EXPORT_NOT_VERIFIED          nothing could be compared
    RunFailedError (bp_runs)
    ├── ChatFailedError              RUNTIME_CHAT_FAILED                  llama.cpp cannot load or run the file
    ├── ConversionFailedError        RUNTIME_EXPORT_CONVERSION            llama.cpp's converter rejects the model
    └── MeasureFailedError           RUNTIME_MEASURE_FAILED               llama.cpp cannot be measured

The adapter's own faults are bp_merge's and bp_runs', the disk's are bp_runs'.
"""

from __future__ import annotations

from bp_runs.errors import DependencyError, PartialError, RunFailedError, UserError


class BaseModelNotFoundError(UserError):
    """The base model is not a folder on this machine."""

    code = "INPUT_EXPORT_BASE_NOT_FOUND"
    when = "The adapter's base model is not a local folder with a config.json."
    default_fix = "Download it and name its folder: {set:base=/path/to/base-model}"


class ModelInvalidError(UserError):
    """The model's folder lacks something or contradicts itself."""

    code = "INPUT_EXPORT_MODEL_INVALID"
    when = "The model's config.json is missing, damaged or incomplete, or its tensors don't match it."
    default_fix = "Download or save the base model again; its folder must hold config.json and all of its weights."


class ArchitectureUnsupportedError(UserError):
    """There is no GGUF layout for this kind of model here."""

    code = "INPUT_EXPORT_ARCHITECTURE"
    when = "GGUF export does not support the model's architecture, or one of its options."
    default_fix = "Export it as a merged model instead: {set:format=merged}"


class TokenizerUnsupportedError(UserError):
    """The tokenizer cannot be written into a GGUF."""

    code = "INPUT_EXPORT_TOKENIZER"
    when = "The tokenizer.json is missing or damaged, or is not a byte-level BPE."
    default_fix = "Export it as a merged model instead: {set:format=merged}"


class PreTokenizerUnknownError(UserError):
    """The tokenizer's splitting rule has no known name in llama.cpp."""

    code = "INPUT_EXPORT_PRE_TOKENIZER"
    when = "The tokenizer splits text by an unknown rule, so llama.cpp might split it differently."
    default_fix = "Export it as a merged model instead: {set:format=merged}"


class QuantizationUnknownError(UserError):
    """The quantization or the format is not one of those that exist."""

    code = "INPUT_EXPORT_QUANTIZATION"
    when = "The quantization or format is unknown."
    default_fix = (
        "Use one of the names that the help lists ({do:export help=true}): {set:format=gguf quantization=q4_k_m}"
    )


class AdapterFormatError(UserError):
    """The adapter cannot be written in the form that was requested."""

    code = "INPUT_EXPORT_ADAPTER_FORMAT"
    when = "The requested format can't represent the adapter, or needs something that was not given."
    default_fix = "Export base and adapter as one file instead: {set:format=gguf}"


class TemplateChangedError(UserError):
    """Chats render differently than when the model was trained."""

    code = "INPUT_EXPORT_TEMPLATE_CHANGED"
    when = "The chat template renders conversations differently than in training."
    default_fix = "Restore the chat template that the model was trained with, and export it again."


class ImportanceInvalidError(UserError):
    """The importance matrix cannot be used."""

    code = "INPUT_EXPORT_IMPORTANCE"
    when = "The importance matrix is missing, damaged, or made for another model."
    default_fix = "Measure one on this model: {do:imatrix MODEL.gguf text=TEXT}; or leave it out."


class OutputTakenError(UserError):
    """The output's place is taken by something that an export must not replace."""

    code = "INPUT_EXPORT_OUTPUT_TAKEN"
    when = "The output exists. Only files of an earlier export can be replaced, and only with force."
    default_fix = "Replace it: {set:force=true}; or choose another place: {set:output=./output/export}"


class OllamaNameTakenError(UserError):
    """Ollama has a model of that name."""

    code = "INPUT_OLLAMA_NAME_TAKEN"
    when = "Ollama already has a model of this name."
    default_fix = "Replace it: {set:force=true}; or choose another name: {set:ollama_name=my-model-2}"


class ChatTargetError(UserError):
    """There is nothing to talk to."""

    code = "INPUT_CHAT_TARGET"
    when = "The chat target is neither a file nor a folder on this machine."
    default_fix = "Name a GGUF, an adapter or a model folder; for a model in Ollama, add {set:ollama=true}."


class PushSourceError(UserError):
    """What should be pushed cannot be."""

    code = "INPUT_HUB_PUSH_SOURCE"
    when = "The source is not an adapter folder, model folder or GGUF, or one of its files contains a secret."
    default_fix = "Name what training or an export wrote: {do:push ./output/lora repo=me/my-model}"


class PushRepoInvalidError(UserError):
    """The Hub has no such names."""

    code = "INPUT_HUB_PUSH_INVALID_REPO"
    when = "The repository name is invalid."
    default_fix = "Use your name there and letters, digits, -, _ and .: {set:repo=me/my-model}"


class PushRepoTakenError(UserError):
    """The repository has files already."""

    code = "INPUT_HUB_PUSH_REPO_TAKEN"
    when = "The repository already has files that the upload would replace."
    default_fix = (
        "Add a commit that replaces them (the old ones stay in its history): {set:force=true}; or name another."
    )


class PushDeniedError(UserError):
    """The Hub does not let the user write there."""

    code = "INPUT_HUB_PUSH_DENIED"
    when = "There is no token, it is invalid, or it can't write to the repository."
    default_fix = "Create a token with write access in the Hub's settings, then: hf auth login"


class GgmlMissingError(DependencyError):
    """ggml's shared library cannot be loaded."""

    code = "DEP_GGML_MISSING"
    when = "libggml-python is not installed, or its library does not load."
    default_fix = "Install the extra: {install:bp-export[ggml]}; or choose another type: {set:quantization=q4_k_m}"


class LlamaCppMissingError(DependencyError):
    """llama.cpp for Python is not installed."""

    code = "DEP_LLAMA_CPP_MISSING"
    when = "A GGUF needs llama.cpp to be run or verified, and xllamacpp is not installed."
    default_fix = "Install the extra: {install:bp-export[verify]}"


class ConverterMissingError(DependencyError):
    """llama.cpp's converter is not on this machine and cannot be installed."""

    code = "DEP_LLAMA_CPP_CONVERTER"
    when = "The model's class has no native GGUF layout, and llama.cpp's converter could not be installed."
    default_fix = (
        "Repeat the command with a network connection: the converter is installed once, in a folder of its own. "
        "Or export the merged model: {set:format=merged}"
    )


class HubMissingError(DependencyError):
    """The Hub's library is not installed."""

    code = "DEP_HUB_MISSING"
    when = "A push needs huggingface_hub and Pillow, which are not installed."
    default_fix = "Install the extra: {install:bp-export[hub]}"


class PushNetworkError(DependencyError):
    """The Hub cannot be reached."""

    code = "DEP_HUB_PUSH_NETWORK"
    when = "The Hub does not answer, or the connection broke. Uploaded files are not sent again."
    default_fix = "Check the connection and that offline mode is off, then repeat the command."


class PushRefusedError(DependencyError):
    """The Hub rejects the upload."""

    code = "DEP_HUB_PUSH_REFUSED"
    when = "The Hub rejected the upload, for a reason other than the token or the name."
    default_fix = "Read the Hub's message, then repeat the command. See status.huggingface.co for outages."


class OllamaRegistrationError(DependencyError):
    """Ollama cannot be reached, or rejects the model."""

    code = "DEP_OLLAMA_REGISTRATION_FAILED"
    when = "Ollama does not answer, or rejects the model. The exported file is kept."
    default_fix = "Start it in another terminal with `ollama serve` (or open the Ollama app), then repeat the command."


class ParityFailedError(PartialError):
    """The written GGUF differs from the trained model by more than its type explains."""

    code = "PARTIAL_EXPORT_PARITY_FAILED"
    when = "The file was written, but in llama.cpp it differs from the trained model."
    default_fix = "Look at the table; try {set:quantization=q8_0}, or leave the check out: {set:verify=false}"


class ParityNotTestedError(PartialError):
    """The written model was to be verified, and nothing says what it should compute."""

    code = "PARTIAL_EXPORT_NOT_VERIFIED"
    when = (
        "The file was written but not verified: training stored no witness, and the independent forward pass "
        "does not support the model."
    )
    default_fix = "Export an adapter that was trained with this version, or leave the check out: {set:verify=false}"


class ChatFailedError(RunFailedError):
    """llama.cpp cannot load the file, or cannot answer with it."""

    code = "RUNTIME_CHAT_FAILED"
    when = "llama.cpp can't load the GGUF, or failed to answer."
    default_fix = (
        "Export the model again; if it fails again, try {set:quantization=bf16} to see whether the type matters."
    )


class ConversionFailedError(RunFailedError):
    """llama.cpp's converter cannot convert the model."""

    code = "RUNTIME_EXPORT_CONVERSION"
    when = "llama.cpp's converter stopped with an error. Its last line is the cause."
    default_fix = "Export the merged model, and convert it with a newer llama.cpp: {set:format=merged}"


class ContextFullError(ChatFailedError):
    """The conversation is longer than the context."""


class MeasureFailedError(RunFailedError):
    """An importance matrix cannot be measured."""

    code = "RUNTIME_MEASURE_FAILED"
    when = "llama.cpp can't load or run the model, or its installed build has an unexpected layout."
    default_fix = (
        "Try another version of xllamacpp, or measure with llama.cpp's own llama-imatrix: {set:importance=FILE}"
    )
