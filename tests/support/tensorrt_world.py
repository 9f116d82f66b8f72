"""What the calls of :mod:`tensorrt_double` do: build, inspect and run engines on the host.

An engine is the ONNX model it was parsed from; ONNX Runtime runs it. Work on the stream is queued
until somebody synchronises, addresses must belong to living buffers, and contexts check the order
of calls, so that what would crash or race on a GPU raises here.
"""

from __future__ import annotations

import base64
import ctypes
import json
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from tensorrt_double import Double, Misuse, load

STREAM = 0x5EED
WORDS = {1: "Float", 10: "Half", 16: "BFloat16", 3: "Int8", 2: "UInt8", 7: "Int64", 6: "Int32",
         9: "Bool"}  # fmt: skip
LAYOUT = {1: "FP32", 10: "FP16", 16: "BF16", 3: "Int8", 7: "Int64", 6: "Int32", 9: "Bool"}
DATA_TYPES = {1: "FLOAT", 10: "HALF", 16: "BF16", 3: "INT8", 2: "UINT8", 7: "INT64", 6: "INT32",
              9: "BOOL"}  # fmt: skip
NUMPY = {1: "float32", 10: "float16", 7: "int64", 6: "int32", 9: "bool"}


class World:
    """Behaviour of the double, and the knobs that tests turn.

    Attributes:
        parser_errors: (operator, node name, index, description) that parsing fails with.
        build_fails: the builder gives nothing, after logging ``build_message``.
        forgets_precision: engines compute in float32 whatever the graph says.
        stuck: the builder works until it is cancelled.
        cancelled: the builder was cancelled and has come to its end.
        memory_per_position: bytes of activations for each element of the first input.
    """

    def __init__(self, major: str, gpu: str = "Test GPU 9000") -> None:
        self.trt: Double = load(major, self)
        self.gpu = gpu
        self.parser_errors: list[tuple[str, str, int, str]] = []
        self.build_fails = False
        self.build_message = "Could not find any implementation for node"
        self.forgets_precision = False
        self.stuck = False
        self.cancelled = False
        self.memory_per_position = 64
        self.queue: list[Callable[[], Any]] = []
        self.capturing: list[tuple[Any, ...]] | None = None
        self.live: dict[int, int] = {}
        self.synchronized = 0

    # --- building ---------------------------------------------------------------------------

    def Builder_init(self, builder: Any, logger: Any) -> None:
        builder.__dict__["logger_"] = logger

    def Builder_create_network(self, builder: Any, flags: int = 0) -> Any:
        if self.trt.__version__.startswith("11") and flags:
            raise Misuse(f"create_network({flags}) on 11")
        return self.trt.make("INetworkDefinition", flags_=flags, proto=None)

    def INetworkDefinition_get_flag(self, net: Any, flag: Any) -> bool:
        return bool(net.flags_ >> int(flag) & 1)

    def _typed(self, net: Any) -> bool:
        if self.trt.__version__.startswith("11"):
            return True
        return self.INetworkDefinition_get_flag(
            net, self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        )

    def OnnxParser_init(self, parser: Any, network: Any, logger: Any) -> None:
        parser.__dict__.update(net=network, errors=[])

    def OnnxParser_parse_from_file(self, parser: Any, model: str) -> bool:
        import onnx

        parser.__dict__["errors"] = list(self.parser_errors)
        if parser.errors:
            return False
        proto = onnx.load(model)
        stored = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
        for index, node in enumerate(proto.graph.node):
            if node.op_type in ("DynamicQuantizeLinear", "MatMulInteger"):
                parser.errors.append((node.op_type, node.name, index, "no importer"))
            if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2:
                zero = stored[node.input[2]]
                if zero.dtype != np.int8 or zero.any():
                    parser.errors.append((node.op_type, node.name, index, "zero point is not 0"))
        parser.net.__dict__["proto"] = proto
        return not parser.errors

    def OnnxParser_num_errors(self, parser: Any) -> int:
        return len(parser.errors)

    def OnnxParser_get_error(self, parser: Any, index: int) -> Any:
        return self.trt.make("ParserError", error=parser.errors[index])

    def ParserError_node_operator(self, error: Any) -> str:
        return error.error[0]

    def ParserError_node_name(self, error: Any) -> str:
        return error.error[1]

    def ParserError_node(self, error: Any) -> int:
        return error.error[2]

    def ParserError_desc(self, error: Any) -> str:
        return error.error[3]

    def INetworkDefinition_num_inputs(self, net: Any) -> int:
        return len(net.proto.graph.input)

    def INetworkDefinition_num_outputs(self, net: Any) -> int:
        return len(net.proto.graph.output)

    def INetworkDefinition_get_input(self, net: Any, index: int) -> Any:
        return self._tensor(net.proto.graph.input[index])

    def INetworkDefinition_get_output(self, net: Any, index: int) -> Any:
        return self._tensor(net.proto.graph.output[index])

    def _tensor(self, value: Any) -> Any:
        dtype = DATA_TYPES[value.type.tensor_type.elem_type]
        return self.trt.make("ITensor", p_name=value.name, p_is_shape_tensor=False,
                             p_dtype=getattr(self.trt.DataType, dtype))

    def Builder_create_builder_config(self, builder: Any) -> Any:
        return self.trt.make("IBuilderConfig", flags_={"TF32"}, profiles=[], cache=None,
                             p_progress_monitor=None, p_profiling_verbosity=None)

    def IBuilderConfig_set_flag(self, config: Any, flag: Any) -> None:
        config.flags_.add(flag.name)

    def IBuilderConfig_clear_flag(self, config: Any, flag: Any) -> None:
        config.flags_.discard(flag.name)

    def IBuilderConfig_set_memory_pool_limit(
        self, config: Any, pool: Any, pool_size: int
    ) -> None: ...

    def IBuilderConfig_create_timing_cache(self, config: Any, serialized_timing_cache: Any) -> Any:
        return self.trt.make("ITimingCache", data=bytes(serialized_timing_cache))

    def _key(self) -> bytes:
        return f"{self.gpu} {self.trt.__version__} ".encode()

    def IBuilderConfig_set_timing_cache(
        self, config: Any, cache: Any, ignore_mismatch: bool
    ) -> bool:
        if ignore_mismatch or (cache.data and not cache.data.startswith(self._key())):
            return False
        config.__dict__["cache"] = cache
        return True

    def IBuilderConfig_get_timing_cache(self, config: Any) -> Any:
        return config.cache

    def ITimingCache_serialize(self, cache: Any) -> bytes:
        return cache.data

    def Builder_create_optimization_profile(self, builder: Any) -> Any:
        return self.trt.make("IOptimizationProfile", shapes={})

    def IOptimizationProfile_set_shape(
        self, profile: Any, input: str, min: Any, opt: Any, max: Any  # noqa: A002
    ) -> None:
        if not all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True)):
            raise RuntimeError("Shape provided for max is inconsistent with other shapes.")
        profile.shapes[input] = [list(min), list(opt), list(max)]

    def IBuilderConfig_add_optimization_profile(self, config: Any, profile: Any) -> int:
        config.profiles.append(profile.shapes)
        return len(config.profiles) - 1

    def Builder_build_serialized_network_to_stream(
        self, builder: Any, network: Any, config: Any, writer: Any
    ) -> bool:
        watch = config.p_progress_monitor
        if watch is not None and not self._work(watch):
            return False
        dynamic = [v.name for v in network.proto.graph.input
                   if any(d.dim_param for d in v.type.tensor_type.shape.dim)]
        complete = all(set(p) == set(dynamic) for p in config.profiles)
        if self.build_fails or not complete or (dynamic and not config.profiles):
            builder.logger_.log(self.trt.ILogger.ERROR, self.build_message)
            return False
        if config.cache is not None:
            config.cache.__dict__["data"] = (config.cache.data or self._key()) + b"t"
        engine = {
            "version": self.trt.__version__, "gpu": self.gpu, "flags": sorted(config.flags_),
            "profiles": config.profiles, "layers": self._layers(network),
            "detailed": config.p_profiling_verbosity == self.trt.ProfilingVerbosity.DETAILED,
            "proto": base64.b64encode(network.proto.SerializeToString()).decode(),
        }  # fmt: skip
        data = json.dumps(engine).encode()
        return writer.write(data) == len(data)

    def _work(self, watch: Any) -> bool:
        """Phases as the builder reports them; False when cancelled."""
        watch.phase_start("Building", None, 2)
        watch.phase_start("Tactics", "Building", 3)
        deadline = time.monotonic() + 30
        while self.stuck:
            if not watch.step_complete("Tactics", 0):
                time.sleep(0.5)  # TensorRT tidies up
                self.cancelled = True
                return False
            assert time.monotonic() < deadline, "nobody cancelled"
            time.sleep(0.01)
        for step in range(2):
            if not watch.step_complete("Building", step):
                return False
        watch.phase_finish("Tactics")
        watch.phase_finish("Building")
        return True

    def _layers(self, net: Any) -> list[dict[str, Any]]:
        """Matrix products with the element types of what they read."""
        import onnx

        inferred = onnx.shape_inference.infer_shapes(net.proto, data_prop=False).graph
        types = {v.name: v.type.tensor_type.elem_type
                 for v in (*inferred.value_info, *inferred.input, *inferred.output)}
        types |= {t.name: t.data_type for t in inferred.initializer}
        restored = {n.output[0] for n in inferred.node if n.op_type == "DequantizeLinear"}
        found = []
        for node in inferred.node:
            if node.op_type not in ("MatMul", "Gemm", "Conv", "Softmax"):
                continue
            # Q/DQ around a product are folded into it.
            reads = [3 if n in restored else types.get(n, 1) for n in node.input if n]
            if not self._typed(net) or self.forgets_precision:
                reads = [1 if t in (10, 16, 3) else t for t in reads]
            kind = "gemm" if node.op_type != "Softmax" else "kgen"
            found.append({"name": node.name, "kind": kind, "reads": reads, "writes": reads[:1]})
        return found

    # --- opening ----------------------------------------------------------------------------

    def Runtime_init(self, runtime: Any, logger: Any) -> None:
        runtime.__dict__["p_engine_host_code_allowed"] = False

    def Runtime_deserialize_cuda_engine(
        self, runtime: Any, serialized_engine: Any = None, **others: Any
    ) -> Any:
        import onnx

        engine = json.loads(bytes(serialized_engine))
        portable = "VERSION_COMPATIBLE" in engine["flags"]
        if engine["version"] != self.trt.__version__ and not portable:
            raise Misuse(f"deserialised an engine of {engine['version']}")
        if engine["gpu"] != self.gpu:
            raise Misuse(f"deserialised an engine of {engine['gpu']}")
        if portable and not runtime.p_engine_host_code_allowed:
            return None
        proto = onnx.load_from_string(base64.b64decode(engine["proto"]))
        return self.trt.make(
            "ICudaEngine", data=engine, proto=proto, contexts=0, budget=None,
            empty="STRIP_PLAN" in engine["flags"], runner=None,
            tensors={v.name: v for v in (*proto.graph.input, *proto.graph.output)},
        )

    def Refitter_init(self, refitter: Any, engine: Any, logger: Any) -> None:
        refitter.__dict__.update(engine=engine, filled=False)

    def OnnxParserRefitter_init(self, parser: Any, refitter: Any, logger: Any) -> None:
        parser.__dict__["refitter"] = refitter

    def OnnxParserRefitter_refit_from_file(self, parser: Any, model: str) -> bool:
        import onnx

        parser.refitter.__dict__["filled"] = onnx.load(model) == parser.refitter.engine.proto
        return True

    def Refitter_refit_cuda_engine(self, refitter: Any) -> bool:
        refitter.engine.__dict__["empty"] = not refitter.filled
        return refitter.filled

    def Refitter_get_missing_weights(self, refitter: Any) -> list[str]:
        return ["some.weight"]

    def ICudaEngine_num_io_tensors(self, engine: Any) -> int:
        return len(engine.tensors)

    def ICudaEngine_get_tensor_name(self, engine: Any, index: int) -> str:
        return list(engine.tensors)[index]

    def ICudaEngine_get_tensor_mode(self, engine: Any, name: str) -> Any:
        inputs = {v.name for v in engine.proto.graph.input}
        return self.trt.TensorIOMode.INPUT if name in inputs else self.trt.TensorIOMode.OUTPUT

    def ICudaEngine_get_tensor_dtype(self, engine: Any, name: str) -> Any:
        kind = DATA_TYPES[engine.tensors[name].type.tensor_type.elem_type]
        return getattr(self.trt.DataType, kind)

    def ICudaEngine_num_optimization_profiles(self, engine: Any) -> int:
        return max(1, len(engine.data["profiles"]))

    def ICudaEngine_get_tensor_profile_shape(
        self, engine: Any, name: str, profile_index: int
    ) -> list[Any]:
        profiles = engine.data["profiles"]
        if not profiles or name not in profiles[profile_index]:
            return [self._shape(engine.tensors[name], {})] * 3
        return profiles[profile_index][name]

    def ICudaEngine_streamable_weights_size(self, engine: Any) -> int:
        return 1 << 20 if "WEIGHT_STREAMING" in engine.data["flags"] else 0

    def ICudaEngine_get_weight_streaming_automatic_budget(self, engine: Any) -> int:
        return 1 << 19

    def ICudaEngine_set_weight_streaming_budget_v2(self, engine: Any, value: int) -> None:
        if engine.contexts:
            raise Misuse("the weight budget was set after a context was made")

    def ICudaEngine_get_device_memory_size_for_profile_v2(
        self, engine: Any, profile_index: int
    ) -> int:
        return 1 << 20

    def ICudaEngine_create_execution_context(self, engine: Any, strategy: Any = None) -> Any:
        if engine.empty:
            raise Misuse("a context of an engine without weights")
        if "WEIGHT_STREAMING" in engine.data["flags"] and (
            "p_weight_streaming_budget_v2" not in engine.__dict__
        ):
            raise Misuse("a context took all weights of an engine that streams them")
        engine.__dict__["contexts"] += 1
        return self.trt.make(
            "IExecutionContext", engine_=engine, profile=None, shapes={}, addresses={},
            memory=None, need=None, stamp=0,
            managed=strategy == self.trt.ExecutionContextAllocationStrategy.USER_MANAGED,
        )

    def ICudaEngine_create_engine_inspector(self, engine: Any) -> Any:
        return self.trt.make("EngineInspector", engine_=engine, p_execution_context=None)

    def EngineInspector_get_engine_information(self, inspector: Any, format: Any) -> str:  # noqa: A002
        if format != self.trt.LayerInformationFormat.JSON:
            raise Misuse("asked for a report that is not JSON")
        data, context = inspector.engine_.data, inspector.p_execution_context
        if not data["detailed"]:
            return json.dumps({"Layers": [layer["name"] for layer in data["layers"]]})
        chosen = context is not None and not self._missing(context)
        layers = []
        for layer in data["layers"]:
            layers.append({
                "Name": layer["name"], "LayerType": layer["kind"],
                "Inputs": [self._described(t, chosen) for t in layer["reads"]],
                "Outputs": [self._described(t, chosen) for t in layer["writes"]],
            })  # fmt: skip
        return json.dumps({"Layers": layers})

    def _described(self, elem_type: int, chosen: bool) -> dict[str, Any]:
        word = WORDS[elem_type] if chosen else "N/A due to dynamic shapes"
        if self.trt.__version__.startswith("10"):
            return {"Name": "t", "Dimensions": [1], "Format/Datatype": word}
        layout = LAYOUT[elem_type] if chosen else "N/A"
        return {"Name": "t", "Dimensions": [1], "DataType": word,
                "Format": f"Row major linear {layout} format (kLINEAR)"}

    # --- running ----------------------------------------------------------------------------

    def IExecutionContext_set_optimization_profile_async(
        self, context: Any, profile_index: int, stream_handle: int
    ) -> bool:
        self._require_stream(stream_handle)
        if profile_index >= self.ICudaEngine_num_optimization_profiles(context.engine_):
            return False
        context.__dict__.update(profile=profile_index, shapes={})
        return True

    def IExecutionContext_set_input_shape(self, context: Any, name: str, shape: Any) -> bool:
        if context.profile is None:
            raise Misuse("a shape was set before the profile")
        low, _, high = self.ICudaEngine_get_tensor_profile_shape(
            context.engine_, name, context.profile
        )
        if len(shape) != len(low) or not all(
            a <= b <= c for a, b, c in zip(low, shape, high, strict=True)
        ):
            return False
        if context.shapes.get(name) != tuple(shape):
            context.__dict__.update(need=None, stamp=context.stamp + 1)
        context.shapes[name] = tuple(shape)
        return True

    def _missing(self, context: Any) -> list[str]:
        return [v.name for v in context.engine_.proto.graph.input if v.name not in context.shapes]

    def IExecutionContext_infer_shapes(self, context: Any) -> list[str]:
        return self._missing(context)

    def IExecutionContext_get_tensor_shape(self, context: Any, name: str) -> Any:
        sizes: dict[str, int] = {}
        for value in context.engine_.proto.graph.input:
            dims = value.type.tensor_type.shape.dim
            given = context.shapes.get(value.name, (-1,) * len(dims))
            sizes |= {d.dim_param: s for d, s in zip(dims, given, strict=True) if d.dim_param}
        return self._shape(context.engine_.tensors[name], sizes)

    def _shape(self, value: Any, sizes: dict[str, int]) -> list[int]:
        return [sizes.get(d.dim_param, -1) if d.dim_param else d.dim_value
                for d in value.type.tensor_type.shape.dim]

    def IExecutionContext_set_tensor_address(self, context: Any, name: str, memory: int) -> bool:
        self._require_live(memory, 1)
        if context.addresses.get(name) != memory:
            context.__dict__["stamp"] += 1
        context.addresses[name] = memory
        return name in context.engine_.tensors

    def IExecutionContext_update_device_memory_size_for_shapes(self, context: Any) -> int:
        if self._missing(context):
            raise Misuse("the memory size was asked for before the shapes were set")
        first = next(iter(context.shapes.values()))
        context.__dict__.update(need=int(np.prod(first)) * self.memory_per_position, memory=None)
        return context.need

    def IExecutionContext_set_device_memory(self, context: Any, memory: int, size: int) -> None:
        if not context.managed:
            raise Misuse("memory given to a context that has its own")
        if context.need is None or size < context.need:
            raise Misuse(f"{size} bytes of memory where {context.need} are needed")
        self._require_live(memory, size)
        context.__dict__.update(memory=(memory, size), stamp=context.stamp + 1)

    def IExecutionContext_execute_async_v3(self, context: Any, stream_handle: int) -> bool:
        self._require_stream(stream_handle)
        missing = [n for n in context.engine_.tensors if n not in context.addresses]
        if self._missing(context) or missing:
            return False
        if context.need is None or context.memory is None:
            raise Misuse("run without device memory for these shapes")
        # On the stream memory is handed on in order: what lives when a launch is queued is enough.
        self._require_live(*context.memory)
        job = self._job(context, dict(context.shapes), dict(context.addresses))
        if self.capturing is None:
            self.queue.append(job)
        else:
            self.capturing.append((context, context.stamp, context.memory, job))
        return True

    def _job(
        self, context: Any, shapes: dict[str, Any], addresses: dict[str, int]
    ) -> Callable[[], None]:
        engine = context.engine_
        outputs = {v.name: tuple(self.IExecutionContext_get_tensor_shape(context, v.name))
                   for v in engine.proto.graph.output}

        def run() -> None:
            import onnxruntime

            if engine.runner is None:
                settings = onnxruntime.SessionOptions()
                settings.log_severity_level = 3
                settings.intra_op_num_threads = 1
                engine.__dict__["runner"] = onnxruntime.InferenceSession(
                    engine.proto.SerializeToString(), settings,
                    providers=["CPUExecutionProvider"],
                )
            feeds = {n: self._view(engine.tensors[n], addresses[n], s).copy()
                     for n, s in shapes.items()}
            found = engine.runner.run(list(outputs), feeds)
            for (name, shape), value in zip(outputs.items(), found, strict=True):
                self._view(engine.tensors[name], addresses[name], shape)[...] = value

        return run

    def _view(self, value: Any, address: int, shape: tuple[int, ...]) -> np.ndarray:
        dtype = np.dtype(NUMPY[value.type.tensor_type.elem_type])
        size = int(np.prod(shape)) * dtype.itemsize
        self._require_live(address, size)
        raw = (ctypes.c_ubyte * size).from_address(address)
        return np.frombuffer(raw, dtype).reshape(shape)

    def _require_stream(self, handle: int) -> None:
        if handle != STREAM:
            raise Misuse(f"stream {handle} is not the session's own")

    def _require_live(self, address: int, size: int) -> None:
        if not any(a <= address and address + size <= a + s for a, s in self.live.items()):
            raise Misuse(f"{size} bytes at {address:#x} are not in a living buffer")

    def drain(self) -> None:
        """Do what was queued on the stream."""
        while self.queue:
            self.queue.pop(0)()


def install(patch: Any, major: str, gpu_name: str = "Test GPU 9000") -> World:
    """Put a double in the place of TensorRT, and the host in the place of the GPU."""
    import sys
    from types import SimpleNamespace

    from modelport import gpu
    from modelport.runtimes import _tensorrt_device

    world = World(major, gpu_name)
    here = gpu.Machine(gpu_name, "9.0", "580.65", "13.0", world.trt.__version__)
    patch.setitem(sys.modules, "tensorrt", world.trt)
    patch.setattr(gpu, "unavailable", lambda: None)
    patch.setattr(gpu, "machine", lambda: here)
    patch.setattr(gpu, "new_stream", lambda: SimpleNamespace(cuda_stream=STREAM))
    patch.setattr(_tensorrt_device, "Device", lambda: HostDevice(world))
    return world


class HostDevice:
    """Stands in for ``runtimes._tensorrt_device.Device``: the same on the host."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.stream = STREAM
        self.captures = 0

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        import torch

        buffer = torch.empty(shape, dtype=getattr(torch, dtype))
        buffer.view(torch.uint8).fill_(0xA5) if buffer.dim() else None
        return self.adopt(buffer)

    def adopt(self, buffer: Any) -> Any:
        address = buffer.data_ptr()
        self.world.live[address] = buffer.numel() * buffer.element_size()
        weakref.finalize(buffer, self.world.live.pop, address, None)
        return buffer

    def upload(self, value: np.ndarray, buffer: Any) -> None:
        import torch

        staged = torch.from_numpy(np.array(value, copy=True))
        self.world.queue.append(lambda: [buffer.copy_(staged)])

    def download(self, buffer: Any) -> np.ndarray:
        self.world.drain()
        return buffer.numpy().copy()

    def address(self, buffer: Any) -> int:
        return buffer.data_ptr()

    def fits(self, value: Any, shape: tuple[int, ...], dtype: str) -> bool:
        return value.is_contiguous() and tuple(value.shape) == shape and str(value.dtype) == (
            f"torch.{dtype}")

    def synchronize(self) -> None:
        self.world.synchronized += 1
        self.world.drain()

    def wait_for_caller(self, reads: Any) -> None: ...

    def let_caller_wait(self, written: Any) -> None: ...

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        if self.world.queue:
            raise Misuse("a capture began while work was in flight")
        self.captures += 1
        self.world.capturing = jobs = []
        try:
            enqueue()
        finally:
            self.world.capturing = None

        def replay() -> None:
            for context, stamp, memory, job in jobs:
                if context.stamp != stamp:
                    raise Misuse("a graph was replayed after its context had changed")
                self.world._require_live(*memory)
                self.world.queue.append(job)

        return replay

    def seconds(self, launch: Callable[[], None]) -> float:
        launch()
        return 1e-3

    def memory(self) -> tuple[int, int]:
        return (1, 2)
