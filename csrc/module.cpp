// fused_resnet._C: what the native kernels do, without a tensor.

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/plan.h"
#include "cuda/plan.h"

namespace py = pybind11;

namespace {

fused_resnet::cuda::Plan cuda_plan(const std::string& operation, const fused_resnet::cuda::Matrix& matrix,
                                   int multiprocessors) {
  namespace cuda = fused_resnet::cuda;
  const int vector = cuda::vector_width(matrix, {});
  if (operation == "batch_norm_stats" || operation == "batch_norm_act_reduce" || operation == "masked_grad") {
    return cuda::reduction_plan(matrix, vector, multiprocessors);
  }
  const cuda::Occupancy occupancy = operation == "batch_norm_act"            ? cuda::kActOccupancy
                                    : operation == "batch_norm_act_backward" ? cuda::kBackwardOccupancy
                                    : operation == "add_masked_"             ? cuda::kAddMaskedOccupancy
                                                                             : cuda::Occupancy{};
  if (occupancy.threads == 0) throw py::value_error("cuda_plan: no kernel passes over activations in " + operation);
  return cuda::plan(matrix, vector, occupancy, multiprocessors);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Plans and instruction sets of the native kernels.";

  m.def(
      "isa", [] { return fused_resnet::cpu::kIsaNames[static_cast<int>(fused_resnet::cpu::isa())]; },
      "The instruction set of the CPU kernels on this machine: the best one built, or a lower one that the environment "
      "variable FUSED_RESNET_ISA names.");

  m.def(
      "isas",
      [] {
        py::list names;
        for (fused_resnet::cpu::Isa isa : fused_resnet::cpu::kIsas) {
          if (fused_resnet::cpu::isa_built(isa)) names.append(fused_resnet::cpu::kIsaNames[static_cast<int>(isa)]);
        }
        return names;
      },
      "The instruction sets that the CPU kernels were compiled for.");

  m.def(
      "plan",
      [](int64_t rows, int64_t channels, int64_t itemsize, int64_t threads) {
        if (rows < 0 || channels < 1 || itemsize < 1 || threads < 1) {
          throw py::value_error("plan: rows must be at least 0, channels, itemsize and threads at least 1");
        }
        const fused_resnet::cpu::Plan plan = fused_resnet::cpu::plan(rows, channels, itemsize);
        const int64_t busy = threads < plan.tiles() ? threads : plan.tiles();
        py::dict result;
        result["pixels_per_row"] = plan.repeat;
        result["row_length"] = plan.row_length;
        result["row_tile"] = plan.row_tile;
        result["row_tiles"] = plan.row_tiles;
        result["column_tile"] = plan.column_tile;
        result["column_tiles"] = plan.column_tiles;
        result["threads"] = busy;
        result["tiles_per_thread"] = busy == 0 ? 0 : (plan.tiles() + busy - 1) / busy;
        return result;
      },
      py::arg("rows"), py::arg("channels"), py::arg("itemsize"), py::arg("threads"),
      "How the reductions cut a channels_last activation of rows = N*H*W pixels into tiles, and how many a thread "
      "gets. "
      "The tiles depend on the shape alone.");

  m.def(
      "cuda_plan",
      [](const std::string& operation, int64_t rows, int64_t channels, int64_t itemsize, int multiprocessors) {
        if (rows < 0 || channels < 1 || (itemsize != 2 && itemsize != 4) || multiprocessors < 1) {
          throw py::value_error(
              "cuda_plan: rows must be at least 0, channels and multiprocessors at least 1, itemsize 2 or 4");
        }
        const fused_resnet::DType dtype = itemsize == 2 ? fused_resnet::DType::kFloat16 : fused_resnet::DType::kFloat32;
        const fused_resnet::cuda::Plan plan = cuda_plan(operation, {dtype, rows, channels}, multiprocessors);
        py::dict result;
        result["vector"] = plan.vector;
        result["tile_columns"] = plan.tile_columns;
        result["block_rows"] = plan.block_rows;
        result["column_tiles"] = plan.column_tiles;
        result["parts"] = plan.parts;
        py::list rows_of_parts;
        for (int64_t part = 0; part < plan.parts; ++part) rows_of_parts.append(plan.rows_of_part(part));
        result["rows_of_parts"] = rows_of_parts;
        return result;
      },
      py::arg("operation"), py::arg("rows"), py::arg("channels"), py::arg("itemsize"), py::arg("multiprocessors"),
      "How an operation's CUDA kernel cuts a channels_last activation of rows = N*H*W pixels into blocks.");
}
