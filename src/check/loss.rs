//! The head's loss on any device, with the votes.

use candle_core::{Device, Result, Tensor};

use crate::ops::Arg;
use crate::ops::head::{PAD, Targets, head_cross_entropy};

/// Mean cross-entropy and votes of fixed targets.
pub struct Loss {
    targets: Targets,
    valid: f64,
    /// The targets on the GPU that they were used on last.
    #[cfg(feature = "cuda")]
    sent: std::sync::Mutex<Option<on_gpu::Sent>>,
}

impl Loss {
    pub fn new(targets: Targets) -> Self {
        let valid = targets.element.iter().filter(|&&element| element != PAD).count() as f64;
        Self {
            targets,
            valid,
            #[cfg(feature = "cuda")]
            sent: Default::default(),
        }
    }

    /// The loss and the votes [B·E], given x, weight and bias.
    pub fn run(&self, x: &[Arg]) -> Result<Vec<Tensor>> {
        let [x, weight, bias] = x else { candle_core::bail!("the head takes three arguments") };
        #[cfg(feature = "cuda")]
        if let Arg::Tensor(tensor) = x
            && tensor.device().is_cuda()
        {
            return self.on_gpu(tensor, weight, bias);
        }
        let out = head_cross_entropy(x.clone(), weight.clone(), bias.clone(), &self.targets, self.valid)?;
        let votes = out.votes.len();
        Ok(vec![out.loss, Tensor::from_vec(out.votes, votes, &Device::Cpu)?])
    }
}

#[cfg(feature = "cuda")]
mod on_gpu {
    use std::sync::Arc;

    use super::*;
    use crate::ops::head::cuda::{DeviceTargets, valid_scale};
    use crate::ops::head::device::head_cross_entropy;

    /// What the head needs of the targets on a device.
    #[derive(Clone)]
    pub struct Sent {
        targets: Arc<DeviceTargets>,
        factor: Tensor,
    }

    impl Loss {
        pub(super) fn on_gpu(&self, x: &Tensor, weight: &Arg, bias: &Arg) -> Result<Vec<Tensor>> {
            let mut sent = self.sent.lock().expect("no task of this op has panicked");
            let here = sent.take().filter(|sent| sent.factor.device().same_device(x.device()));
            let here = match here {
                Some(here) => here,
                None => {
                    let shape = (self.targets.batch, self.targets.steps);
                    let send = |values: &[u32]| Tensor::from_slice(values, shape, x.device());
                    let (labels, element) = (send(&self.targets.labels)?, send(&self.targets.element)?);
                    let targets = Arc::new(DeviceTargets { labels, element });
                    Sent { factor: valid_scale(&targets)?, targets }
                }
            };
            let (targets, factor) = (&here.targets, &here.factor);
            let elements = self.targets.elements;
            let (loss, totals) =
                head_cross_entropy(x, weight.clone(), bias.clone(), targets, elements, factor)?;
            *sent = Some(here);
            Ok(vec![loss, totals.votes.flatten_all()?])
        }
    }
}
