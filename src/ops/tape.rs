//! Differentiable nodes on Candle's tape, with as many inputs and outputs as an operation has.
//!
//! Candle's custom ops take at most three tensors and give one, and its backward pass adds every
//! gradient into a fresh zero tensor of the argument's size. A recurrence has up to eight inputs and two
//! outputs, and those zeros and sums are a third of a CPU's training step. [`apply`] bridges the two: the
//! tape sees one-element *tokens* where the operation has tensors, so nothing is packed or copied, and
//! gradients pass from node to node beside it.
//!
//! ```text
//!   inputs ──► Gather (token) ──► Core (token) ──► Emit (output 0)
//!   inputs ──► Gather (token) ──┘             └──► Emit (output 1)
//! ```
//!
//! Going back, Candle's order of nodes is what counts: a `Core` is reached when every node that used its
//! outputs is done. By then each of them has put its gradient where it belongs, into the output of the
//! node that made its input; the core calls [`Node::backward`] once with what came together. An input
//! that no node of ours made (a variable, the result of one of Candle's operations) is gathered as it is,
//! and an output that one of Candle's operations uses gets its gradient through `Emit`: both worlds mix.
//!
//! Parameters stay off the tape altogether: [`Param`] is an argument whose gradient is added straight to
//! its place in the flat gradient buffer, which is what makes micro-batches, clipping and the optimizer
//! one pass each.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, OnceLock};

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Storage, Tensor, TensorId,
};

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
    /// A tensor seen in another shape; see [`view`].
    View(Tensor, Shape),
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

/// `tensor` in another shape with as many elements, for the next operation: `Tensor::reshape` without a
/// node on the tape and without its pass over the gradient.
pub fn view(tensor: &Tensor, shape: impl Into<Shape>) -> Arg {
    Arg::View(tensor.clone(), shape.into())
}

impl Arg {
    /// The value, cut off from the graph.
    fn value(&self) -> Result<Tensor> {
        match self {
            Arg::Tensor(tensor) => tensor.detach().contiguous(),
            Arg::View(tensor, shape) => tensor.detach().contiguous()?.reshape(shape),
            Arg::Param(param) => param.value().contiguous(),
        }
    }

    pub fn shape(&self) -> Shape {
        match self {
            Arg::Tensor(tensor) => tensor.shape().clone(),
            Arg::View(_, shape) => shape.clone(),
            Arg::Param(param) => param.value().shape().clone(),
        }
    }

    /// The tensor on the graph.
    fn tensor(&self) -> Option<&Tensor> {
        match self {
            Arg::Tensor(tensor) | Arg::View(tensor, _) => Some(tensor),
            Arg::Param(_) => None,
        }
    }
}

/// Where an output's gradient comes together.
#[derive(Clone)]
struct Output {
    shared: Arc<Shared>,
    index: usize,
    /// The core's token: what a node that uses the output hangs on.
    token: Tensor,
}

/// The living outputs of nodes, by the tensors they are. An entry leaves with its tensor.
static OUTPUTS: LazyLock<Mutex<HashMap<TensorId, Output>>> = LazyLock::new(Default::default);

/// A gradient that is still growing.
#[derive(Clone)]
struct Sum {
    grad: Tensor,
    /// Whether the storage belongs to this sum alone.
    own: bool,
}

impl Output {
    /// Adds to the gradient of the output.
    fn add(&self, grad: Tensor) -> Result<()> {
        let slot = &mut self.shared.output_grads.lock().unwrap()[self.index];
        *slot = Some(match slot.take() {
            None => Sum { grad, own: false },
            Some(Sum { grad: sum, own: true }) => {
                sum.inplace_op2(&grad.reshape(sum.shape())?.contiguous()?, &super::add::AddAssign)?;
                Sum { grad: sum, own: true }
            }
            Some(Sum { grad: first, own: false }) => {
                let grad = grad.reshape(first.shape())?;
                Sum { grad: super::add::sum(&first.contiguous()?, &grad.contiguous()?)?, own: true }
            }
        });
        Ok(())
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
    let values: Vec<Tensor> = args.iter().map(Arg::value).collect::<Result<_>>()?;
    let recording = !NO_GRAD.with(Cell::get);
    let needs: Vec<bool> =
        args.iter().map(|arg| recording && arg.tensor().is_none_or(Tensor::track_op)).collect();
    let save = needs.contains(&true);
    let device = values[0].device().clone();
    let Forward { outputs, saved } = node.forward(&values, save)?;
    if !save {
        let blank = Tensor::zeros(1, candle_core::DType::F32, &device)?;
        return outputs.into_iter().map(|value| blank.apply_op1_no_bwd(&Emit::new(value, None))).collect();
    }

    let count = outputs.len();
    let targets: Vec<Target> = args
        .iter()
        .zip(&needs)
        .map(|(arg, needed)| match (arg, arg.tensor()) {
            _ if !needed => Target::None,
            (Arg::Param(param), _) => Target::Param(param.clone()),
            (_, Some(tensor)) => match OUTPUTS.lock().unwrap().get(&tensor.id()) {
                Some(output) => Target::Output(output.clone()),
                None => Target::Candle(tensor.clone()),
            },
            (_, None) => Target::None,
        })
        .collect();
    // What the core waits for: tokens of the nodes before it, each once, and tensors from elsewhere.
    let mut edges: Vec<(Option<usize>, Tensor)> = Vec::new();
    for (i, target) in targets.iter().enumerate() {
        match target {
            Target::Candle(tensor) => edges.push((Some(i), tensor.clone())),
            Target::Output(output) if edges.iter().all(|(_, edge)| edge.id() != output.token.id()) => {
                edges.push((None, output.token.clone()));
            }
            _ => {}
        }
    }
    let shared = Arc::new(Shared {
        node: Box::new(node),
        run: Mutex::new(Some(Run { args: values, saved, needs })),
        output_grads: Mutex::new(vec![None; count]),
        input_grads: Mutex::new(vec![None; args.len()]),
        targets: Mutex::new(targets),
    });
    let mut token: Option<Tensor> = None;
    for group in edges.chunks(2) {
        let mut group = group.to_vec();
        group.extend(token.take().map(|token| (None, token)));
        let gather =
            Gather { shared: shared.clone(), inputs: group.iter().map(|(input, _)| *input).collect() };
        token = Some(match &group[..] {
            [(_, a)] => a.apply_op1(gather)?,
            [(_, a), (_, b)] => a.apply_op2(b, gather)?,
            [(_, a), (_, b), (_, c)] => a.apply_op3(b, c, gather)?,
            _ => unreachable!("chunks of two, and a token"),
        });
    }
    // Only parameters: hang the node on the anchor, so that the tape reaches it.
    let anchor =
        || args.iter().find_map(|arg| if let Arg::Param(param) = arg { Some(param.anchor()) } else { None });
    let token = token.or_else(anchor).expect("something needs a gradient");
    let core = token.apply_op1(Core { shared: shared.clone() })?;
    outputs
        .into_iter()
        .enumerate()
        .map(|(index, value)| {
            let output = Output { shared: shared.clone(), index, token: core.clone() };
            let emit = Emit::new(value, Some(output.clone()));
            let id = emit.id.clone();
            let tensor = core.apply_op1(emit)?;
            OUTPUTS.lock().unwrap().insert(tensor.id(), output);
            let _ = id.set(tensor.id());
            Ok(tensor)
        })
        .collect()
}

/// Where the gradient of an argument goes.
enum Target {
    None,
    Param(Param),
    Output(Output),
    /// A tensor that no node of ours made: its gradient goes back through Candle's own store.
    Candle(Tensor),
}

struct Shared {
    node: Box<dyn Node>,
    run: Mutex<Option<Run>>,
    targets: Mutex<Vec<Target>>,
    output_grads: Mutex<Vec<Option<Sum>>>,
    input_grads: Mutex<Vec<Option<Tensor>>>,
}

/// A one-element tensor: what the tape carries instead of the node's tensors.
fn token_storage() -> (CpuStorage, Shape) {
    (CpuStorage::F32(vec![0.0]), Shape::from(1))
}

fn token_grad(token: &Tensor) -> Result<Tensor> {
    token.zeros_like()
}

/// Stands for up to three things that a node waits for: inputs whose gradients it hands out, or tokens.
struct Gather {
    shared: Arc<Shared>,
    /// Which argument an input is; none for a token.
    inputs: Vec<Option<usize>>,
}

impl Gather {
    fn take(&self, k: usize, input: &Tensor) -> Result<Option<Tensor>> {
        match self.inputs[k] {
            Some(i) => Ok(self.shared.input_grads.lock().unwrap()[i].take()),
            None => token_grad(input).map(Some),
        }
    }
}

impl CustomOp1 for Gather {
    fn name(&self) -> &'static str {
        self.shared.node.name()
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok(token_storage())
    }
    fn bwd(&self, a: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        self.take(0, a)
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
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((self.take(0, a)?, self.take(1, b)?))
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
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        Ok((self.take(0, a)?, self.take(1, b)?, self.take(2, c)?))
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
            .map(|sum| sum.take().map(|sum| sum.grad.contiguous()).transpose())
            .collect::<Result<_>>()?;
        let grads = shared.node.backward(&run, &output_grads)?;
        // Taken as well: with the links gone, nodes are freed one by one, not in a deep recursion.
        let targets = std::mem::take(&mut *shared.targets.lock().unwrap());
        for (i, (target, grad)) in targets.into_iter().zip(grads).enumerate() {
            let Some(grad) = grad else { continue };
            match target {
                Target::None => {}
                Target::Param(param) => param.accumulate(&grad)?,
                Target::Output(output) => output.add(grad)?,
                Target::Candle(tensor) => {
                    shared.input_grads.lock().unwrap()[i] = Some(grad.reshape(tensor.shape())?);
                }
            }
        }
        Ok(Some(token_grad(token)?))
    }
}

/// One output of a node: takes the core's token, gives the tensor that the forward pass made.
struct Emit {
    value: Mutex<Option<Value>>,
    output: Option<Output>,
    /// The tensor that this became.
    id: Arc<OnceLock<TensorId>>,
}

impl Emit {
    fn new(value: Value, output: Option<Output>) -> Self {
        Self { value: Mutex::new(Some(value)), output, id: Default::default() }
    }
}

impl Drop for Emit {
    fn drop(&mut self) {
        if let Some(id) = self.id.get() {
            // Dropped after the lock is free: it may hold the last reference to other outputs.
            let _entry = OUTPUTS.lock().unwrap().remove(id);
        }
    }
}

impl CustomOp1 for Emit {
    fn name(&self) -> &'static str {
        self.output.as_ref().map_or("emit", |output| output.shared.node.name())
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        match self.value.lock().unwrap().take() {
            Some(Value { storage: Storage::Cpu(storage), shape }) => Ok((storage, shape)),
            _ => candle_core::bail!("{}: the output is not on the CPU", CustomOp1::name(self)),
        }
    }
    fn bwd(&self, token: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        if let Some(output) = &self.output {
            output.add(grad.clone())?;
        }
        Ok(Some(token_grad(token)?))
    }
}
