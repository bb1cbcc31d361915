// Watching a step: named phases for profiles, named results for comparisons.
#pragma once
#include "attention/steps.h"
#include "dsv4/attention.h"

namespace dsv4 {

// Announces a step to the observer for as long as it lives.
class StepScope {
 public:
  StepScope(const ForwardOptions& options, AttentionStep step)
      : observer_(options.observer), step_(step) {
    if (observer_ != nullptr) observer_->begin(step_name(step_));
  }
  ~StepScope() {
    if (observer_ != nullptr) observer_->end(step_name(step_));
  }
  StepScope(const StepScope&) = delete;
  StepScope& operator=(const StepScope&) = delete;

 private:
  StepObserver* observer_;
  AttentionStep step_;
};

/// Copies a (row-strided) device tensor to the host and hands it to the sink, if there is one.
void tap_tensor(const ForwardOptions& options, Device& device, Stream stream, std::string_view name,
                const ConstTensor& value);

}  // namespace dsv4
