"""Converts a GGUF file to another format by llama.cpp's quantiser.

convert_gguf.py SOURCE FORMAT TARGET
"""

import sys

import llama_cpp

_FILE_TYPES = {
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "BF16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "F16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
}


def main() -> None:
    source, form, target = sys.argv[1:]
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = _FILE_TYPES[form]
    params.allow_requantize = True
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), params):
        raise RuntimeError(f"llama.cpp cannot convert {source} to {form}")


if __name__ == "__main__":
    main()
