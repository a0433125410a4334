// fused_resnet._C: what the native kernels do, without a tensor.

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "fused_resnet/isa.h"
#include "fused_resnet/plan.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Plans and instruction sets of the native kernels.";

  m.def(
      "isa", [] { return fused_resnet::kIsaNames[static_cast<int>(fused_resnet::isa())]; },
      "The instruction set of the CPU kernels on this machine: the best one built, or a lower one that the environment "
      "variable FUSED_RESNET_ISA names.");

  m.def(
      "isas",
      [] {
        py::list names;
        for (fused_resnet::Isa isa : fused_resnet::kIsas) {
          if (fused_resnet::isa_built(isa)) names.append(fused_resnet::kIsaNames[static_cast<int>(isa)]);
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
        const fused_resnet::Plan plan = fused_resnet::plan(rows, channels, itemsize);
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
}
