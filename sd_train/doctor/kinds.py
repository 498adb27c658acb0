"""Every kind of finding, as data: name, severity, title, explanation, fix."""

from __future__ import annotations

from sd_train.doctor.finding import Kind, Severity

KINDS: dict[str, Kind] = {}
"""By name, in the order in which they are reported within a severity."""


def _kind(name: str, severity: Severity, title: str, explanation: str, fix: str) -> Kind:
    KINDS[name] = kind = Kind(name, severity, title, explanation, fix)
    return kind


CONFIG = _kind(
    "config", "error", "The dataset file cannot be used",
    "{problem}", "correct this first; images and captions are looked at once the file can be read",
)
STOPS = _kind("stops", "error", "A run would stop here", "{problem}", "see the message")

# Files that cannot be read
MISSING_FILE = _kind(
    "missing_file", "error", "File is not there",
    "A run stops: what stands in the folder is a link to nothing, or the file went away.",
    "restore the file, or remove the link",
)
EMPTY_FILE = _kind(
    "empty_file", "error", "Empty image file",
    "The file has no content, as after a failed copy or a full disk. A run stops.",
    "copy it again, remove it, or give --skip_broken_images",
)
FOREIGN = _kind(
    "not_an_image", "error", "Not an image",
    "The name ends like an image, the content is something else. A run stops.",
    "download or export it again, remove it, or give --skip_broken_images",
)
BROKEN_HEADER = _kind(
    "broken_header", "error", "Broken header",
    "The start of the file, which holds its size, cannot be read. A run stops while it lists the images.",
    "restore it from a copy, remove it, or give --skip_broken_images",
)
TRUNCATED = _kind(
    "truncated", "error", "Broken or cut off",
    "The size can be read, the pixels cannot: a run would stop in the middle of the first epoch.",
    "restore it from a copy, remove it, or give --skip_broken_images",
)
LEFT_OUT = _kind(
    "left_out", "warning", "Broken and left out",
    "The file is missing or cannot be read, and skip_broken_images leaves it out.",
    "restore it from a copy, or remove it",
)

# What the files hold
WRONG_EXTENSION = _kind(
    "wrong_extension", "warning", "Extension says another format",
    "The trainer goes by content and reads these; other tools go by name and may not.",
    "rename them after their content",
)
ROTATED = _kind(
    "exif_rotated", "note", "Turned by EXIF",
    "The pixels lie turned or mirrored in the file and a tag says how to show them. They are trained upright, as "
    "shown here; other trainers ignore the tag and train them lying.",
    "nothing to do here; save them upright if other tools use them too",
)
ANIMATED = _kind(
    "animated", "warning", "Several frames",
    "Only the first frame is trained.", "save the frames you want as images of their own",
)
CMYK = _kind(
    "cmyk", "warning", "CMYK colours",
    "Print colours are converted without the file's colour profile, so they may come out too bright or shifted.",
    "convert them to sRGB in an image editor",
)
SIXTEEN_BIT = _kind(
    "sixteen_bit", "note", "More than 8 bits a channel",
    "Only the upper 8 bits of each value are trained.",
    "nothing, if they look right here; images that use a small part of the range are dark: stretch and save as 8 bits",
)
PALETTE = _kind(
    "palette", "note", "Palette image",
    "At most 256 colours: gradients may show bands or dots, which a model learns.",
    "use the original in full colour if there is one",
)
GREY = _kind(
    "grey", "note", "Grey picture among colour pictures",
    "Without 'monochrome' or the like in its caption, the model learns that the subject has no colour.",
    "write it into the caption, or remove the picture",
)
BLANK = _kind(
    "blank", "warning", "One single colour", "There is nothing to learn from.", "remove it",
)
TRANSPARENT = _kind(
    "transparent", "warning", "Transparent parts become white",
    "The pictures are laid on white, as shown here, and white backgrounds are learned.",
    "set alpha_mask = true to leave transparent parts out of the loss, or put the picture on a background of your own",
)
INVISIBLE = _kind(
    "invisible", "warning", "Wholly transparent",
    "Every pixel is transparent: what is trained is a white picture.", "remove it, or save it without transparency",
)
TINY = _kind(
    "tiny", "warning", "Tiny picture",
    "It is enlarged more than {limit} times; the model learns the blur.", "use a larger version, or remove it",
)
ENLARGED = _kind(
    "enlarged", "warning", "Much enlarged",
    "It is enlarged more than {limit} times; the model learns the softness.",
    "use a larger version, set skip_image_resolution, or set bucket_no_upscale = true",
)
NO_BUCKET = _kind(
    "no_bucket", "error", "Too small for any bucket",
    "After scaling, a side is shorter than bucket_reso_steps, and bucket_no_upscale forbids to enlarge. A run stops.",
    "remove it, or set bucket_no_upscale = false",
)
CROPPED = _kind(
    "cropped", "warning", "Much is cut off",
    "No bucket has nearly this shape: the dimmed parts (more than {limit:.0%} of the picture) are never seen.",
    "crop it yourself, or widen min_bucket_reso and max_bucket_reso",
)
CROPPED_SQUARE = _kind(
    "cropped_without_buckets", "warning", "Much is cut off, as buckets are off",
    "All pictures are cut to {resolution}: the dimmed parts (more than {limit:.0%} of the picture) are never seen.",
    "set enable_bucket = true",
)
FACE_OUTSIDE = _kind(
    "face_name_invalid", "warning", "Face lies outside of the picture",
    "face_crop_aug_range is set, and the numbers in the name (_x_y_width_height) do not lie within the picture.",
    "correct the name, or take the numbers away",
)
FACE_MISSING = _kind(
    "face_name_missing", "note", "No face in the file name",
    "face_crop_aug_range is set; without _x_y_width_height at the end of the name the picture is cropped as usual.",
    "add the numbers, if its face matters",
)

# Copies
COPY = _kind(
    "duplicate", "warning", "Exact copies",
    "The same picture stands here under several names, so it is learned more often than the others.",
    "remove the copies; raise num_repeats where more weight is meant",
)
COPY_REG = _kind(
    "duplicate_reg", "error", "Learned and regularisation picture are the same",
    "Regularisation pictures show what is not to change; these are at the same time what is to be learned.",
    "remove them from the regularisation folder",
)
NEAR = _kind(
    "near_duplicate", "note", "Nearly the same picture",
    "The same picture saved, scaled, cropped or mirrored in another way; together they count more than the others.",
    "keep the best of each group",
)
NEAR_REG = _kind(
    "near_duplicate_reg", "warning", "Learned and regularisation picture are nearly the same",
    "Regularisation pictures show what is not to change; these are at the same time what is to be learned.",
    "remove them from the regularisation folder",
)
NEAR_VALIDATION = _kind(
    "near_duplicate_validation", "warning", "Nearly the same picture in training and validation",
    "The validation loss looks better than it is, as it is measured on pictures that are learned.",
    "keep one picture of each group",
)
CAPTIONS_DIFFER = _kind(
    "captions_differ", "warning", "The same picture with different captions",
    "The copies contradict or repeat each other.", "keep one copy with the better caption",
)

# Captions
CAPTION_MISSING = _kind(
    "caption_missing", "error", "No caption",
    "There is no {extension} file and no class_tokens that could take its place. A run stops.",
    "write captions, set class_tokens, or give --allow_missing_captions to train with an empty caption",
)
CAPTION_MISSING_ALLOWED = _kind(
    "caption_missing_here", "warning", "No caption, while others have one",
    "These are trained with {instead}.", "write their captions",
)
CAPTION_ELSEWHERE = _kind(
    "caption_other_extension", "error", "Caption has another extension",
    "No {extension} file, but one of another extension, stands beside the picture. A run stops rather than ignore it.",
    "set caption_extension = {other!r}, or rename the files",
)
CAPTION_TWICE = _kind(
    "caption_twice", "note", "A second caption file",
    "Two caption files of different extension stand beside the picture; only {extension} is read.",
    "remove the one that is not meant",
)
CAPTION_SHARED = _kind(
    "caption_shared", "warning", "One caption file for several pictures",
    "These differ in their extension only, so they share one caption file (and kohya's .npz).",
    "rename one of them",
)
CAPTION_EMPTY_FILE = _kind(
    "caption_empty_file", "error", "Empty caption file",
    "The file has no content, as after a failed tagger. A run stops.",
    "write the caption, or one blank line for an empty caption",
)
CAPTION_BLANK = _kind(
    "caption_blank", "warning", "Empty caption",
    "The caption holds nothing but blanks: the picture is trained without a caption.",
    "write the caption; remove the picture if there is nothing to say",
)
CAPTION_ENCODING = _kind(
    "caption_not_utf8", "error", "Caption is not UTF-8",
    "The file is written in another encoding. A run stops.", "save it as UTF-8",
)
CAPTION_MOJIBAKE = _kind(
    "caption_garbled", "warning", "Garbled characters",
    "UTF-8 was read as another encoding and saved again, or characters were lost.", "restore the text",
)
CAPTION_INVISIBLE = _kind(
    "caption_invisible", "warning", "Invisible characters",
    "Control or zero-width characters stand between the words and become tokens.", "remove them",
)
CAPTION_LINES = _kind(
    "caption_lines", "warning", "Only the first line is read",
    "The caption has several lines and enable_wildcard is off.",
    "join the lines, or set enable_wildcard = true to choose one of them for every sample",
)
CAPTION_FIRST_LINE = _kind(
    "caption_first_line_blank", "warning", "Blank first line",
    "Only the first line is read, and it is blank: the picture is trained without the text below.",
    "remove the blank line",
)
CAPTION_CUT = _kind(
    "caption_cut", "warning", "Caption is cut",
    "Longer than {limit} tokens: what follows is never read.",
    "shorten it, or give --max_token_length {longer}",
)
CAPTION_CUT_LAST = _kind(
    "caption_cut_at_225", "warning", "Caption is cut",
    "Longer than 225 tokens, the longest there is: what follows is never read.", "shorten it",
)
TAG_TWICE = _kind(
    "tag_repeated", "warning", "Tag stands twice in a caption",
    "It takes tokens without saying more.", "remove the repetition",
)
TAG_SPELLING = _kind(
    "tag_spelling", "warning", "One tag in two spellings",
    "They differ in blanks, hyphens or underscores only, and are different words to the model: {spellings}.",
    "write it in one way",
)
TAG_TYPO = _kind(
    "tag_typo", "note", "Rare tag that looks like a slip",
    "It differs in one letter from a frequent tag: {spellings}.", "correct it if it is one",
)
WILDCARD_OFF = _kind(
    "wildcard_off", "warning", "Braces that are not filled in",
    "{{a|b}} stands in the caption and enable_wildcard is off: the braces are trained as they are.",
    "set enable_wildcard = true, or remove the braces",
)
SEPARATOR_UNSET = _kind(
    "keep_separator_unset", "warning", "||| without keep_tokens_separator",
    "It is trained as text.", "set keep_tokens_separator = '|||', or remove it from the captions",
)
SEPARATOR_ABSENT = _kind(
    "keep_separator_absent", "warning", "Caption without keep_tokens_separator",
    "Other captions hold {separator!r}, this one does not: keep_tokens ({keep}) counts instead.", "add it",
)
TRIGGER_ABSENT = _kind(
    "trigger_absent", "warning", "Caption without the first tag of all the others",
    "Nearly every caption begins with {trigger!r}, these do not hold it.", "add it, if it is the word to be learned",
)
CLASS_IGNORED = _kind(
    "class_tokens_ignored", "warning", "class_tokens are not used",
    "The picture has a caption file, which replaces class_tokens ({tokens!r}), and its words do not stand in it.",
    "write them into the caption (caption_prefix does it for all), or remove class_tokens",
)
CAPTION_ORPHAN = _kind(
    "caption_orphan", "warning", "Caption without picture",
    "No picture has this name, so the caption is never read.", "restore or rename the picture, or remove the caption",
)

# Masks
MASK_MISSING = _kind(
    "mask_missing", "error", "No mask", "conditioning_data_dir holds no file of this name. A run stops.",
    "make the mask (white is learned, black is not), or remove the picture",
)
MASK_ORPHAN = _kind(
    "mask_orphan", "warning", "Mask without picture", "No picture has this name.", "rename or remove it",
)
MASK_BROKEN = _kind("mask_broken", "error", "Mask cannot be read", "A run stops.", "save it anew")
MASK_BLACK = _kind(
    "mask_black", "warning", "Mask is all black",
    "The loss has weight {weight:g} everywhere on this picture{nothing}.", "correct the mask, or remove the picture",
)
MASK_WHITE = _kind(
    "mask_white", "warning", "Mask is all white", "It hides nothing, while other masks do.", "correct the mask",
)
MASK_SHAPE = _kind(
    "mask_shape", "error", "Mask has another shape than its picture",
    "It cannot be laid over the picture. A run stops.", "save it in the picture's size, turned as the picture is seen",
)
ALPHA_ABSENT = _kind(
    "alpha_absent", "note", "No transparency to use as mask",
    "alpha_mask is set and other pictures have transparency; this one is learned everywhere.",
    "save it with transparency, if a part is to be left out",
)

# What is shown
REG_UNUSED = _kind(
    "reg_unused", "note", "Regularisation pictures that are never shown",
    "As many as there are learned pictures, repeats counted, are used; these come later in the list.",
    "raise num_repeats of the learned pictures, or leave them as they are",
)
SKIPPED = _kind(
    "skipped_resolution", "warning", "Left out for its size",
    "sqrt(width x height) is not above skip_image_resolution ({limit:g}).", "use larger versions, or lower the limit",
)
NEVER_SHOWN = _kind(
    "never_shown", "warning", "Never shown", "The settings leave this picture out.", "look at num_repeats and subsets",
)
SHORT_BATCH = _kind(
    "short_batch", "note", "Bucket that does not fill one batch",
    "It has fewer samples in an epoch than a batch holds ({batch_size}), so its batches are short.",
    "crop the pictures to a more common shape, or set bucket_policy = 'merge'",
)
UNSUPPORTED = _kind(
    "unsupported_format", "warning", "Image format that is not read",
    "Files of this extension are passed over.", "convert them to PNG, JPEG or WebP, or move them away",
)
HIDDEN = _kind(
    "subfolder", "warning", "Sub-folder with pictures",
    "Sub-folders are not read.", "give each its own [[datasets.subsets]], or move the pictures up",
)
STRAY = _kind(
    "stray_file", "note", "File that nothing reads", "It is neither picture nor caption.", "move it away",
)
METADATA_IMAGE_MISSING = _kind(
    "metadata_image_missing", "error", "Entry without picture",
    "The metadata name a picture that is not there. A run stops.", "restore the picture, or remove the entry",
)
METADATA_ENTRY_MISSING = _kind(
    "metadata_entry_missing", "warning", "Picture without entry",
    "It lies in the folder and the metadata do not name it, so it is not trained.", "add it, or move it away",
)
