//! Differentiable nodes on Candle's tape, with as many inputs and outputs as an operation has.
//!
//! Candle's custom ops take at most three tensors and give one, and its backward pass adds every
//! gradient into a fresh zero tensor of the argument's size. A recurrence has up to eight inputs and two
//! outputs. [`apply`] bridges the two: the tape sees one-element *tokens* where the operation has
//! tensors, so nothing is packed or copied.
//!
//! ```text
//!   inputs ──► Gather (token) ──► Core (token) ──► Emit (output 0)
//!   inputs ──► Gather (token) ──┘             └──► Emit (output 1)
//! ```
//!
//! Going back, every `Emit` leaves the gradient of its output in the node's shared [`Run`]; `Core` then
//! has all of them, calls [`Node::backward`] once, and every `Gather` hands out what belongs to its inputs.
//!
//! Parameters stay off the tape altogether: [`Param`] is an argument whose gradient is added straight to
//! its place in the flat gradient buffer, which is what makes micro-batches, clipping and the optimizer
//! one pass each.

use std::cell::Cell;
use std::sync::{Arc, Mutex};

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Storage, Tensor};

use super::real::Real;
use crate::model::param::Param;

/// A value that a [`Node`] computed: storage and shape, not yet a tensor of the graph.
pub struct Value {
    storage: Storage,
    shape: Shape,
}

impl Value {
    /// A value on the CPU, contiguous, row-major.
    pub fn cpu<F: Real>(data: Vec<F>, shape: impl Into<Shape>) -> Self {
        let shape = shape.into();
        debug_assert_eq!(data.len(), shape.elem_count());
        Self { storage: Storage::Cpu(F::to_cpu_storage_owned(data)), shape }
    }
}

/// What a forward pass gives: its outputs, and what only the backward pass needs.
#[derive(Default)]
pub struct Forward {
    pub outputs: Vec<Value>,
    /// Kept until the backward pass; left empty when nothing will be differentiated.
    pub saved: Vec<Tensor>,
}

/// An operation with a hand-written gradient.
///
/// Implementations dispatch on the device of their arguments. All arguments arrive detached.
pub trait Node: Send + Sync + 'static {
    /// The op's name, as in `src/ops/<name>` and `kernels/<name>.cu`.
    fn name(&self) -> &'static str;

    /// Computes the outputs from `args`. `save` is false when no backward pass can follow.
    fn forward(&self, args: &[Tensor], save: bool) -> Result<Forward>;

    /// The gradient of every argument, given `grads`, the gradient of every output (`None`: the output
    /// took no part in the loss). Gradients that `run.needs` does not ask for may be left out.
    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>>;
}

/// What the backward pass of a node sees of its forward pass.
pub struct Run {
    pub args: Vec<Tensor>,
    pub saved: Vec<Tensor>,
    /// Which arguments want a gradient.
    pub needs: Vec<bool>,
}

/// An argument of an operation: a tensor of the graph, or a parameter.
#[derive(Clone)]
pub enum Arg {
    Tensor(Tensor),
    Param(Param),
}

impl From<&Tensor> for Arg {
    fn from(tensor: &Tensor) -> Self {
        Arg::Tensor(tensor.clone())
    }
}

impl From<&Param> for Arg {
    fn from(param: &Param) -> Self {
        Arg::Param(param.clone())
    }
}

impl Arg {
    /// The value, cut off from the graph.
    pub fn value(&self) -> Tensor {
        match self {
            Arg::Tensor(tensor) => tensor.detach(),
            Arg::Param(param) => param.value(),
        }
    }

    pub fn shape(&self) -> Shape {
        match self {
            Arg::Tensor(tensor) => tensor.shape().clone(),
            Arg::Param(param) => param.value().shape().clone(),
        }
    }
}

thread_local! {
    static NO_GRAD: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f` without recording anything for a backward pass: evaluation in constant memory.
pub fn no_grad<T>(f: impl FnOnce() -> T) -> T {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            NO_GRAD.with(|flag| flag.set(self.0));
        }
    }
    let _restore = Restore(NO_GRAD.with(|flag| flag.replace(true)));
    f()
}

/// Applies `node` to `args` and puts the result on the tape.
pub fn apply<N: Node>(node: N, args: &[Arg]) -> Result<Vec<Tensor>> {
    let values: Vec<Tensor> = args.iter().map(|arg| arg.value().contiguous()).collect::<Result<_>>()?;
    let recording = !NO_GRAD.with(Cell::get);
    let needs: Vec<bool> = args
        .iter()
        .map(|arg| match arg {
            Arg::Tensor(tensor) => recording && tensor.track_op(),
            Arg::Param(_) => recording,
        })
        .collect();
    let save = needs.contains(&true);
    let device = values[0].device().clone();
    let Forward { outputs, saved } = node.forward(&values, save)?;
    if !save {
        let blank = Tensor::zeros(1, candle_core::DType::F32, &device)?;
        return outputs.into_iter().map(|value| blank.apply_op1_no_bwd(&Emit::new(value, None))).collect();
    }

    let count = outputs.len();
    let shared = Arc::new(Shared {
        node: Box::new(node),
        args: args.to_vec(),
        run: Mutex::new(Some(Run { args: values, saved, needs: needs.clone() })),
        output_grads: Mutex::new(vec![None; count]),
        input_grads: Mutex::new(vec![None; args.len()]),
    });
    let mut token = None;
    let tracked: Vec<usize> = (0..args.len()).filter(|&i| needs[i]).collect();
    let inputs: Vec<(usize, Tensor)> = tracked
        .iter()
        .filter_map(|&i| match &args[i] {
            Arg::Tensor(tensor) => Some((i, tensor.clone())),
            Arg::Param(_) => None,
        })
        .collect();
    for group in inputs.chunks(2) {
        let gather = Gather { shared: shared.clone(), inputs: group.iter().map(|(i, _)| *i).collect() };
        token = Some(match (token, group) {
            (None, [(_, a)]) => a.apply_op1(gather)?,
            (None, [(_, a), (_, b)]) => a.apply_op2(b, gather)?,
            (Some(token), [(_, a)]) => a.apply_op2(&token, gather)?,
            (Some(token), [(_, a), (_, b)]) => a.apply_op3(b, &token, gather)?,
            _ => unreachable!("chunks of two"),
        });
    }
    let token = match token {
        Some(token) => token,
        // Only parameters: hang the node on the anchor, so that the tape reaches it.
        None => args
            .iter()
            .find_map(|arg| match arg {
                Arg::Param(param) => Some(param.anchor()),
                Arg::Tensor(_) => None,
            })
            .expect("something needs a gradient"),
    };
    let core = token.apply_op1(Core { shared: shared.clone() })?;
    outputs
        .into_iter()
        .enumerate()
        .map(|(i, value)| core.apply_op1(Emit::new(value, Some((shared.clone(), i)))))
        .collect()
}

struct Shared {
    node: Box<dyn Node>,
    args: Vec<Arg>,
    run: Mutex<Option<Run>>,
    output_grads: Mutex<Vec<Option<Tensor>>>,
    input_grads: Mutex<Vec<Option<Tensor>>>,
}

/// A one-element tensor: what the tape carries instead of the node's tensors.
fn token_storage() -> (CpuStorage, Shape) {
    (CpuStorage::F32(vec![0.0]), Shape::from(1))
}

fn token_grad(token: &Tensor) -> Result<Tensor> {
    token.zeros_like()
}

/// Stands for up to two inputs of a node, and the token of the inputs before them.
struct Gather {
    shared: Arc<Shared>,
    inputs: Vec<usize>,
}

impl Gather {
    fn take(&self, k: usize) -> Option<Tensor> {
        self.shared.input_grads.lock().unwrap()[self.inputs[k]].take()
    }
}

impl CustomOp1 for Gather {
    fn name(&self) -> &'static str {
        self.shared.node.name()
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok(token_storage())
    }
    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(self.take(0))
    }
}

impl CustomOp2 for Gather {
    fn name(&self) -> &'static str {
        self.shared.node.name()
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok(token_storage())
    }
    fn bwd(
        &self,
        _: &Tensor,
        second: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        match self.inputs.len() {
            1 => Ok((self.take(0), Some(token_grad(second)?))),
            _ => Ok((self.take(0), self.take(1))),
        }
    }
}

impl CustomOp3 for Gather {
    fn name(&self) -> &'static str {
        self.shared.node.name()
    }
    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok(token_storage())
    }
    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        token: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        Ok((self.take(0), self.take(1), Some(token_grad(token)?)))
    }
}

/// The operation itself, seen by the tape as token in, token out.
struct Core {
    shared: Arc<Shared>,
}

impl CustomOp1 for Core {
    fn name(&self) -> &'static str {
        self.shared.node.name()
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok(token_storage())
    }
    fn bwd(&self, token: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        let shared = &self.shared;
        // Taken, not borrowed: what the forward pass kept is freed as the backward pass moves on.
        let Some(run) = shared.run.lock().unwrap().take() else {
            candle_core::bail!("{}: backward was called twice on one graph", shared.node.name())
        };
        let output_grads: Vec<Option<Tensor>> = shared
            .output_grads
            .lock()
            .unwrap()
            .iter_mut()
            .map(|grad| grad.take().map(|grad| grad.contiguous()).transpose())
            .collect::<Result<_>>()?;
        let grads = shared.node.backward(&run, &output_grads)?;
        let mut input_grads = shared.input_grads.lock().unwrap();
        for (i, grad) in grads.into_iter().enumerate() {
            let Some(grad) = grad else { continue };
            if !run.needs[i] {
                continue;
            }
            match &shared.args[i] {
                Arg::Tensor(_) => input_grads[i] = Some(grad),
                Arg::Param(param) => param.accumulate(&grad)?,
            }
        }
        Ok(Some(token_grad(token)?))
    }
}

/// One output of a node: takes the core's token, gives the tensor that the forward pass made.
struct Emit {
    value: Mutex<Option<Value>>,
    target: Option<(Arc<Shared>, usize)>,
}

impl Emit {
    fn new(value: Value, target: Option<(Arc<Shared>, usize)>) -> Self {
        Self { value: Mutex::new(Some(value)), target }
    }
}

impl CustomOp1 for Emit {
    fn name(&self) -> &'static str {
        self.target.as_ref().map_or("emit", |(shared, _)| shared.node.name())
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        match self.value.lock().unwrap().take() {
            Some(Value { storage: Storage::Cpu(storage), shape }) => Ok((storage, shape)),
            _ => candle_core::bail!("{}: the output is not on the CPU", CustomOp1::name(self)),
        }
    }
    fn bwd(&self, token: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        if let Some((shared, i)) = &self.target {
            shared.output_grads.lock().unwrap()[*i] = Some(grad.clone());
        }
        Ok(Some(token_grad(token)?))
    }
}
