//! One op with its inputs, run anywhere: on the CPU in f64 for reference, on a device in its number formats.

use candle_core::{DType, Device, Result, Tensor, Var};
use serde::Serialize;

use crate::config::Precision;
use crate::model::param::{Builder, Init, Param, ParamStore};
use crate::ops::philox::{philox4x32, unit_f32};
use crate::ops::tape::{Leaf, pull_back};
use crate::ops::{Arg, no_grad};

/// The number formats that a device computes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Route {
    F32,
    /// f32, with the operands of matrix products rounded to tf32.
    Tf32,
    /// Activations and the operands of matrix products in bf16, everything else in f32.
    Bf16,
}

impl Route {
    pub const ALL: [Route; 3] = [Route::F32, Route::Tf32, Route::Bf16];

    pub fn name(self) -> &'static str {
        match self {
            Route::F32 => "f32",
            Route::Tf32 => "tf32",
            Route::Bf16 => "bf16",
        }
    }

    /// The type of activations.
    pub fn dtype(self) -> DType {
        if self == Route::Bf16 { DType::BF16 } else { DType::F32 }
    }

    /// As a configuration names it.
    pub fn precision(self) -> Precision {
        match self {
            Route::F32 => Precision::F32,
            Route::Tf32 => Precision::Tf32,
            Route::Bf16 => Precision::Bf16,
        }
    }

    /// Makes matrix products of f32 tensors round, or not, as this route says; for the whole process.
    pub fn select(self) {
        candle_core::cuda::set_gemm_reduced_precision_f32(self == Route::Tf32);
        #[cfg(feature = "cuda")]
        crate::cuda::allow_tf32(self == Route::Tf32);
    }
}

/// What an input is to an op, which tells its number format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A tensor of the graph, in the format that the device computes in.
    Activation,
    /// A tensor of the graph that is f32 on every route: decays, write strengths, states.
    Exact,
    /// A parameter, f32 on every route.
    Param,
    /// A parameter that matrix products take.
    Weight,
    /// u32, without a gradient.
    Ids,
}

pub struct Input {
    pub name: &'static str,
    pub kind: Kind,
    /// On the CPU, f32 or u32.
    pub value: Tensor,
}

impl Input {
    /// The value as every implementation gets it: rounded to what the route can hold.
    fn rounded(&self, route: Route) -> Result<Tensor> {
        match self.kind {
            Kind::Activation | Kind::Weight if route == Route::Bf16 => {
                self.value.to_dtype(DType::BF16)?.to_dtype(DType::F32)
            }
            _ => Ok(self.value.clone()),
        }
    }

    /// Bytes of one pass over it on a route.
    fn bytes(&self, route: Route) -> usize {
        let size = match self.kind {
            Kind::Activation | Kind::Weight => route.dtype().size_in_bytes(),
            Kind::Exact | Kind::Param | Kind::Ids => 4,
        };
        self.value.elem_count() * size
    }
}

/// An op's public function.
pub type Run = Box<dyn Fn(&[Arg]) -> Result<Vec<Tensor>> + Send + Sync>;

/// One op with inputs.
pub struct Case {
    pub op: &'static str,
    /// The sizes, to be read.
    pub size: String,
    /// What "a token" of the throughput is: a timestep of a sequence, for the optimizer a parameter.
    pub tokens: usize,
    pub inputs: Vec<Input>,
    pub outputs: &'static [&'static str],
    /// Floating-point operations of the forward pass in its recurrent form.
    pub operations: f64,
    /// Operations of the backward pass, in forward passes.
    pub backward: f64,
    pub run: Run,
}

/// How the numbers are held: the reference in f64 on the CPU, or a route on a device.
#[derive(Clone, Debug)]
pub enum Place {
    /// f64 on the CPU, with inputs rounded as the route rounds them.
    Reference(Route),
    On(Device, Route),
}

impl Place {
    fn route(&self) -> Route {
        match self {
            Place::Reference(route) | Place::On(_, route) => *route,
        }
    }
}

/// A named result, on the CPU in the type it was computed in.
pub struct Named {
    pub name: String,
    pub value: Tensor,
}

/// The inputs of a case on a device.
pub struct Bound {
    vars: Vec<Option<Var>>,
    params: Vec<Option<Param>>,
    args: Vec<Arg>,
    store: Option<ParamStore>,
}

impl Case {
    /// Whether there is a gradient to check.
    pub fn differentiable(&self) -> bool {
        !matches!(self.op, "adam" | "global_norm")
    }

    /// The least bytes of the forward pass: every input read once, every output written once.
    pub fn forward_bytes(&self, route: Route, outputs: &[Tensor]) -> usize {
        self.inputs.iter().map(|input| input.bytes(route)).sum::<usize>() + bytes(outputs)
    }

    /// The least bytes of both passes: the backward pass reads the inputs again and the gradients of the outputs
    /// that the loss uses, and writes a gradient for every input.
    pub fn both_bytes(&self, route: Route, outputs: &[Tensor], used: &[Tensor]) -> usize {
        let inputs = |of: &dyn Fn(&&Input) -> bool| -> usize {
            self.inputs.iter().filter(of).map(|input| input.bytes(route)).sum()
        };
        let all = inputs(&|_| true);
        // Gradients of parameters are f32.
        let gradients = inputs(&|input| matches!(input.kind, Kind::Activation | Kind::Exact));
        let parameters = self.inputs.iter().filter(|input| matches!(input.kind, Kind::Param | Kind::Weight));
        let parameters: usize = parameters.map(|input| 4 * input.value.elem_count()).sum();
        2 * all + bytes(outputs) + bytes(used) + gradients + parameters
    }

    /// Puts the inputs where they are needed.
    pub fn bind(&self, place: &Place) -> Result<Bound> {
        let (device, activation, exact, model) = match place {
            Place::Reference(_) => (&Device::Cpu, DType::F64, DType::F64, DType::F64),
            Place::On(device, route) => (device, route.dtype(), DType::F32, route.dtype()),
        };
        let builder = Builder::new();
        let (mut vars, mut params) = (vec![], vec![]);
        for input in &self.inputs {
            let value = input.rounded(place.route())?;
            let param = match input.kind {
                Kind::Param | Kind::Weight => {
                    let values = value.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
                    Some(builder.param(input.name, value.dims(), Init::Values(values)))
                }
                _ => None,
            };
            let var = match input.kind {
                Kind::Activation => Some(Var::from_tensor(&value.to_device(device)?.to_dtype(activation)?)?),
                Kind::Exact => Some(Var::from_tensor(&value.to_device(device)?.to_dtype(exact)?)?),
                _ => None,
            };
            vars.push(var);
            params.push(param);
        }
        let store =
            if params.iter().any(Option::is_some) { Some(builder.finish(0, model, device)?) } else { None };
        let args = (self.inputs.iter().zip(&vars).zip(&params))
            .map(|((input, var), param)| match (var, param) {
                (Some(var), _) => Ok(Arg::Tensor(var.as_tensor().clone())),
                (None, Some(param)) => Ok(Arg::from(param)),
                (None, None) => Ok(Arg::Tensor(input.value.to_device(device)?)),
            })
            .collect::<Result<_>>()?;
        Ok(Bound { vars, params, args, store })
    }

    /// The outputs alone.
    pub fn forward(&self, bound: &Bound) -> Result<Vec<Tensor>> {
        no_grad(|| (self.run)(&bound.args))
    }

    /// Which outputs a loss may use: the first `most` of those with a gradient.
    pub fn used<'a>(&self, outputs: &'a [Tensor], most: usize) -> Vec<&'a Tensor> {
        outputs.iter().filter(|output| output.track_op()).take(most).collect()
    }

    /// Forward and backward pass, given what makes the gradients of the outputs. Gives the outputs and the
    /// gradient of every input that has one.
    pub fn both(
        &self,
        bound: &Bound,
        most: usize,
        grad: impl Fn(usize, &Tensor) -> Result<Tensor>,
    ) -> Result<(Vec<Tensor>, Vec<Option<Tensor>>)> {
        let leaves: Vec<Option<Leaf>> = bound.vars.iter().map(|var| var.as_ref().map(Leaf::of)).collect();
        let outputs = (self.run)(&bound.args)?;
        let used = self.used(&outputs, most);
        let pairs = (used.into_iter().enumerate())
            .map(|(i, output)| Ok((output, grad(i, output)?)))
            .collect::<Result<Vec<_>>>()?;
        pull_back(&pairs)?;
        drop(pairs);
        let grads = (leaves.iter().zip(&bound.params))
            .map(|(leaf, param)| match (leaf, param) {
                (Some(leaf), _) => leaf.grad(),
                (None, Some(param)) => Some(param.grad()),
                (None, None) => None,
            })
            .collect();
        Ok((outputs, grads))
    }

    /// Outputs and gradients by name, on the CPU; the gradients are those of Σ output · w over the first `most`
    /// outputs, for random w.
    pub fn results(&self, place: &Place, most: usize) -> Result<Results> {
        let bound = self.bind(place)?;
        if !self.differentiable() {
            let outputs = self.named(&self.forward(&bound)?)?;
            return Ok(Results { outputs, grads: vec![] });
        }
        if let Some(store) = &bound.store {
            store.zero_grad()?;
        }
        let (outputs, grads) = self.both(&bound, most, |i, output| {
            loss_weights(i, output.dims(), place.route())?
                .to_device(output.device())?
                .to_dtype(output.dtype())
        })?;
        let mut named = vec![];
        for (input, grad) in self.inputs.iter().zip(grads) {
            if input.kind == Kind::Ids {
                continue;
            }
            let Some(grad) = grad else { candle_core::bail!("no gradient of {} came", input.name) };
            if grad.elem_count() != input.value.elem_count() {
                candle_core::bail!("the gradient of {} has shape {:?}", input.name, grad.shape())
            }
            let value = grad.reshape(input.value.shape())?.to_device(&Device::Cpu)?;
            named.push(Named { name: input.name.into(), value });
        }
        Ok(Results { outputs: self.named(&outputs)?, grads: named })
    }

    /// The outputs without a backward pass to come.
    pub fn outputs(&self, place: &Place) -> Result<Vec<Named>> {
        let bound = self.bind(place)?;
        self.named(&self.forward(&bound)?)
    }

    fn named(&self, outputs: &[Tensor]) -> Result<Vec<Named>> {
        let named = |(name, output): (&&str, &Tensor)| {
            Ok(Named { name: name.to_string(), value: output.to_device(&Device::Cpu)? })
        };
        self.outputs.iter().zip(outputs).map(named).collect()
    }
}

/// What one run of a case gave.
pub struct Results {
    pub outputs: Vec<Named>,
    pub grads: Vec<Named>,
}

fn bytes(tensors: &[Tensor]) -> usize {
    tensors.iter().map(|tensor| tensor.elem_count() * tensor.dtype().size_in_bytes()).sum()
}

/// The gradient of the `i`-th output: between −1.5 and 1.5, and never near zero on average.
fn loss_weights(i: usize, shape: &[usize], route: Route) -> Result<Tensor> {
    let n = shape.iter().product::<usize>();
    let value = |at: usize| 3.0 * unit_f32(philox4x32([at as u32, i as u32, 0, 0], [17, 23])[0]) - 1.5;
    let tensor = Tensor::from_vec((0..n).map(value).collect::<Vec<f32>>(), shape, &Device::Cpu)?;
    if route == Route::Bf16 { tensor.to_dtype(DType::BF16)?.to_dtype(DType::F32) } else { Ok(tensor) }
}
