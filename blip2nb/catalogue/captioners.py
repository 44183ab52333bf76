"""The catalogue of a captioner: every model's faults, and those of its configuration and its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from blip2nb.catalogue import any_model
from blip2nb.catalogue import in_inputs as inputs
from blip2nb.catalogue import in_settings as settings
from blip2nb.catalogue.any_model import catalogue
from blip2nb.catalogue.planting import Fault


def _configuration(name: str, words: str, cause: str, where: Callable, *also: str) -> Fault:
    return Fault(name, words, "configuration", cause, where, settings.configured, frozenset(also))


def _input(name: str, words: str, cause: str, where: Callable, how: inputs.How, *also: str) -> Fault:
    return Fault(name, words, "inputs", cause, where, how, frozenset(also))


# fmt: off
CATALOGUE: Mapping[str, Fault] = any_model.CATALOGUE | catalogue([
    _configuration("eps_configured", "A tower's eps is another.",
                   "eps", settings.eps_settings),
    _configuration("activation_configured", "A tower's activation function is another.",
                   "activation", settings.activation_settings),
    _configuration("heads_configured", "A tower has another number of heads.",
                   "head_count", settings.head_settings, "attention_scale"),
    _configuration("tie_configured", "T5's configuration says that its embedding is tied, which scales the logits too.",
                   "logits_scale", settings.tie_setting, "scale", "tied"),
    _configuration("distance_configured", "T5's relative positions end at another distance.",
                   "position_bias", settings.distance_setting),
    _configuration("start_configured", "T5's decoder starts with another token.",
                   "tokens", settings.start_setting, "bos_missing"),
    _configuration("image_token", "The image is put where another token stands, which is nowhere.",
                   "tokens", settings.image_token_setting, "sequence_order"),
    _configuration("image_mean", "Images are normalised with other statistics than CLIP's.",
                   "image_mean_std", settings.image_settings(*settings.STATISTICS)),
    _configuration("image_resample", "Images are resized otherwise than bicubically.",
                   "interpolation", settings.image_settings(*settings.FILTERS)),
    _configuration("image_rescale", "Pixel values are not brought to between 0 and 1, or not by 1/255.",
                   "pixels", settings.image_settings(*settings.FACTORS), "image_mean_std"),
    _input("channel_order", "Images come with blue first.",
           "channel_order", inputs.at_image, inputs.with_image(inputs.blue_first)),
    _input("rescaled_twice", "Images come with values between 0 and 1, and are divided by 255 again.",
           "pixels", inputs.at_image, inputs.with_image(inputs.rescaled_already), "image_mean_std"),
    _input("image_mirrored", "Images are mirrored.",
           "pixels", inputs.at_image, inputs.with_image(inputs.mirrored)),
    _input("default_processor", "The image processor that is the default resizes with another library.",
           "interpolation", inputs.at_image, inputs.default_processor, "pixels"),
    _input("prompt", "The text is another.",
           "prompt", inputs.at_text(), inputs.with_text(inputs.exchange_words), "tokens"),
    _input("prompt_missing", "There is no text at all.",
           "prompt", inputs.at_longer_text(), inputs.with_text(lambda text: ""), "tokens"),
    _input("bos_missing", "OPT's text does not begin with the beginning of a sequence.",
           "bos_missing", inputs.at_longer_text(kind="opt"), inputs.without(inputs.first_text)),
    _input("newline_missing", "OPT's text does not end in a line break.",
           "newline_missing", inputs.at_longer_text(kind="opt"), inputs.without(inputs.last)),
    _input("eos_missing", "T5's text does not end in the end of the sequence.",
           "tokens", inputs.at_longer_text(kind="t5"), inputs.without(inputs.last)),
    _input("token_too_many", "An end of the sequence is put behind the text.",
           "tokens", inputs.at_longer_text(), inputs.with_tokens(inputs.one_more)),
    _input("padded", "The text is padded to a fixed length.",
           "tokens", inputs.at_longer_text(forms=inputs.PADS), inputs.padded, "padding_side", "attention_mask"),
    _input("text_first", "The text comes before the image.",
           "sequence_order", inputs.at_text(), inputs.with_tokens(inputs.text_first)),
    _input("input_mask", "The mask hides tokens that should be seen, or shows what should be hidden.",
           "attention_mask", inputs.at_mask, inputs.masked),
    _input("answer_shifted", "T5's answer is shifted by hand, and again by the model.",
           "tokens", inputs.at_answer, inputs.with_answer(lambda ids: ids.roll(1, dims=1)), "bos_missing"),
    _input("answer_short", "T5's answer lacks its last token.",
           "tokens", inputs.at_answer, inputs.with_answer(lambda ids: ids[:, :-1])),
])
# fmt: on
