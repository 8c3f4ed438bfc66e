"""The protocol's binary messages, as a table; `google.protobuf` reads and writes them.

Numbers and types are those of package `tinker_public` in tinker 0.38.0; fields this server never looks at are left out,
and protobuf passes over them.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# Message -> (field, number, type); a type in capitals is another message, [] repeats, ? tells absence from zero, and
# map<K,V> is a map.
FIELDS: dict[str, tuple[tuple[str, int, str], ...]] = {
    "EncodedTextChunk": (("tokens", 1, "bytes"),),
    "Chunk": (("encoded_text", 1, "EncodedTextChunk"), ("image", 2, "bytes"), ("dmel", 3, "bytes")),
    "Tensor": (("dense", 1, "bytes"), ("sparse_csr", 2, "bytes"), ("dtype", 3, "int32"), ("shape", 4, "int64[]")),
    "Datum": (("model_input", 1, "Chunk[]"), ("loss_fn_inputs", 2, "map<string,Tensor>")),
    "LossConfigValue": (("number", 1, "double?"), ("text", 2, "string?")),
    "ForwardBackwardRequest": (
        ("model_id", 1, "string"),
        ("seq_id", 2, "int32"),
        ("data", 3, "Datum[]"),
        ("loss_fn", 4, "string"),
        ("loss_fn_config", 5, "map<string,double>"),
        ("forward_only", 6, "bool"),
        ("loss_fn_config_v2", 7, "map<string,LossConfigValue>"),
    ),
    "BatchedTensor": (
        ("data", 1, "bytes"), ("offsets", 2, "bytes"), ("dtype", 3, "int32"), ("trailing_shape", 4, "int64[]"),
    ),
    "ArrayRecord": (
        ("type_tag", 1, "string"), ("fields", 2, "map<string,BatchedTensor>"), ("num_datums", 3, "int64"),
    ),
    "ForwardBackwardOutput": (
        ("loss_fn_output_type", 1, "string"),
        ("loss_fn_outputs", 2, "ArrayRecord[]"),
        ("metrics", 3, "map<string,double>"),
    ),
    "TopkLogprobs": (("token_ids", 1, "bytes"), ("logprobs", 2, "bytes"), ("k", 3, "uint32"), ("length", 4, "uint32")),
    "SampledSequence": (
        ("stop_reason", 1, "int32"),
        ("tokens", 2, "bytes"),
        ("logprobs", 3, "bytes?"),
        ("topk_sampled_logprobs", 4, "TopkLogprobs"),
    ),
    "SampleResponse": (
        ("sequences", 1, "SampledSequence[]"),
        ("prompt_logprobs", 2, "bytes?"),
        ("topk_prompt_logprobs", 3, "TopkLogprobs"),
    ),
}  # fmt: skip
PACKAGE = "tercet.tinker"
FLOAT32, INT64, INT32 = 1, 2, 3


def _add_field(message: Any, name: str, number: int, kind: str) -> None:
    field = message.field.add(name=name, number=number, label=3 if kind.endswith("[]") or kind.startswith("map") else 1)
    if kind.startswith("map<"):
        key, value = kind[4:-1].split(",")
        # A map is a repeated message of key and value, named after the field.
        entry = message.nested_type.add(name="".join(part.capitalize() for part in name.split("_")) + "Entry")
        entry.options.map_entry = True
        _add_field(entry, "key", 1, key)
        _add_field(entry, "value", 2, value)
        field.type, field.type_name = 11, f".{PACKAGE}.{message.name}.{entry.name}"
        return
    plain = kind.removesuffix("[]").removesuffix("?")
    if plain in FIELDS:
        field.type, field.type_name = 11, f".{PACKAGE}.{plain}"
        return
    field.type = descriptor_pb2.FieldDescriptorProto.Type.Value(f"TYPE_{plain.upper()}")
    if kind.endswith("?"):
        field.proto3_optional = True
        field.oneof_index = len(message.oneof_decl)
        message.oneof_decl.add(name=f"_{name}")


def _classes() -> dict[str, Any]:
    file: Any = descriptor_pb2.FileDescriptorProto(name="tercet/tinker.proto", package=PACKAGE, syntax="proto3")
    for name, fields in FIELDS.items():
        message = file.message_type.add(name=name)
        for field in fields:
            _add_field(message, *field)
    # A pool of its own: a program that also imports the SDK has the same messages in the common one.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in FIELDS}


MESSAGES: dict[str, Any] = _classes()
