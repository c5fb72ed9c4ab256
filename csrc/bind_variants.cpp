// Bindings of csrc/variants.h: which variants apply to a problem, and which one it takes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind_geometry.h"
#include "bindings.h"
#include "cpu/dispatch.h"
#include "variants.h"

namespace py = pybind11;

namespace sk {
namespace {

constexpr const char* kVariantNames[] = {
#define SK_VARIANT(id, name) name,
    SK_VARIANTS(SK_VARIANT)
#undef SK_VARIANT
};
constexpr const char* kPassNames[] = {"conv2d", "conv2d_dgrad", "conv2d_wgrad",
                                      "linear", "linear_dgrad", "linear_wgrad"};
static_assert(std::size(kVariantNames) == size_t(Variant::kEnd), "one name per variant");
static_assert(std::size(kPassNames) == size_t(Pass::kEnd), "one name per pass");

std::string Joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

std::vector<std::string> AllNames() { return {std::begin(kVariantNames), std::end(kVariantNames)}; }

Pass PassOf(const std::string& name) {
  for (size_t i = 0; i < std::size(kPassNames); ++i)
    if (name == kPassNames[i]) return Pass(i);
  Refuse("ProductVariants: pass must be one of " +
         Joined({std::begin(kPassNames), std::end(kPassNames)}) + ", got " + name);
}

// Those whose plan is neither the rule's nor that of a variant before them.
std::vector<Variant> Applicable(const VariantKey& key) {
  std::vector<Variant> found{Variant::kRule};
  std::vector<uint64_t> prints{sparse_kernels().plan_print(key, Variant::kRule)};
  for (int i = 1; i < int(Variant::kEnd); ++i) {
    uint64_t print;
    try {
      print = sparse_kernels().plan_print(key, Variant(i));
    } catch (const std::invalid_argument&) {
      continue;  // its slab would be beyond 32-bit offsets
    }
    if (std::find(prints.begin(), prints.end(), print) != prints.end()) continue;
    prints.push_back(print);
    found.push_back(Variant(i));
  }
  return found;
}

class ProductVariants {
 public:
  ProductVariants(const std::string& pass, const std::vector<int64_t>& geom, int64_t bh, int64_t bw,
                  int64_t capacity)
      : pass_(pass) {
    const char* kernel = "ProductVariants";
    RequireSize(kernel, "bh", bh, 1);
    RequireSize(kernel, "bw", bw, 1);
    RequireSize(kernel, "capacity", capacity);
    key_ = {PassOf(pass), Geometry(kernel, geom), bh, bw, capacity};
    const ConvGeometry& g = key_.g;
    // Where there is nothing to compute there is nothing to choose.
    if (InputElements(g) == 0 || OutputElements(g) == 0 || capacity == 0) {
      applicable_ = {Variant::kRule};
    } else {
      applicable_ = Applicable(key_);
    }
  }

  std::vector<std::string> Names() const {
    std::vector<std::string> names;
    for (const Variant v : applicable_) names.push_back(kVariantNames[int(v)]);
    return names;
  }

  void Use(const std::string& name) const {
    for (const Variant v : applicable_) {
      if (name != kVariantNames[int(v)]) continue;
      set_variant(key_, v);
      return;
    }
    const std::vector<std::string> all = AllNames();
    const bool known = std::find(all.begin(), all.end(), name) != all.end();
    Refuse("variant '" + name + "' " + (known ? "does not apply to this " + pass_ : "is unknown") +
           ": choose one of " + Joined(Names()));
  }

  std::string Used() const { return kVariantNames[int(find_variant(key_))]; }

 private:
  std::string pass_;
  VariantKey key_;
  std::vector<Variant> applicable_;
};

}  // namespace

void bind_variants(py::module_& m) {
  py::class_<ProductVariants>(
      m, "ProductVariants",
      "The variants of one product (csrc/variants.h) under the instruction set in use. `pass`: "
      "conv2d, conv2d_dgrad, conv2d_wgrad, linear, linear_dgrad or linear_wgrad; `geom`: 18 "
      "integers as for conv2d, of a linear layer those of a convolution of one pixel by one tap; "
      "`capacity`: stored blocks.")
      .def(py::init<const std::string&, const std::vector<int64_t>&, int64_t, int64_t, int64_t>(),
           py::arg("pass_"), py::arg("geom"), py::arg("bh"), py::arg("bw"), py::arg("capacity"))
      .def_property_readonly("names", &ProductVariants::Names,
                             "Those that apply, \"rule\" (the built-in choice) first.")
      .def("use", &ProductVariants::Use, py::arg("name"),
           "Products of this pass, geometry, block and about this capacity take the variant from "
           "now on. ValueError for one that does not apply.")
      .def_property_readonly("used", &ProductVariants::Used, "The variant in use.");
  m.def("variant_names", &AllNames, "Every variant there is, \"rule\" first.");
  m.def("clear_variants", &clear_variants, "Every product takes the rule again.");
  m.def("count_variants", &count_variants, "Problems that take another variant than the rule.");
}

}  // namespace sk
