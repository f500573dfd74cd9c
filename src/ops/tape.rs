//! Differentiable nodes on Candle's tape, with as many inputs and outputs as an operation has.
//!
//! Candle's custom ops take at most three tensors and give one, and its backward pass adds every
//! gradient into a fresh zero tensor of the argument's size. A recurrence has up to eight inputs and two
//! outputs, and those zeros and sums are a third of a CPU's training step. [`apply`] bridges the two: the
//! gradients pass from node to node beside Candle's tape, and nothing is packed or copied.
//!
//! A node whose inputs all lead back to parameters and to nodes of ours is *pure*: it waits in
//! `PENDING` until every younger node has put its gradient into the outputs it used, and runs then;
//! Candle sees only one-element anchors, and on a GPU the tape costs no kernel. The output that
//! `Tensor::backward` starts from hangs on the `anchor`, which is the last that Candle reaches.
//!
//! A node that uses a tensor from elsewhere (a variable, the result of one of Candle's operations), or the
//! output of such a node, is *mixed*: Candle's order of nodes must then hold across both worlds, so it is
//! a chain of one-element *tokens* on Candle's tape. The gathers hand gradients out to the tensors from
//! elsewhere, the core runs the node.
//!
//! ```text
//!   tensors from elsewhere ──► Gather (token) ──► Core (token) ──► Emit (output)
//!   tokens of mixed nodes  ──► Gather (token) ──┘             └──► Emit (output)
//! ```
//!
//! In both worlds a gradient goes where it belongs at once: into the output of the node that made the
//! input. An output that one of Candle's operations uses gets its gradient through `Emit`.
//!
//! Parameters stay off the tape altogether: [`Param`] is an argument whose gradient is added straight to
//! its place in the flat gradient buffer, which is what makes micro-batches, clipping and the optimizer
//! one pass each.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, OnceLock};

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, DeviceLocation, Layout, Result,
    Shape, Storage, Tensor, TensorId, Var,
};

use super::real::Real;
use crate::model::param::Param;
use crate::trace;

/// A value that a [`Node`] computed: storage and shape, not yet a tensor of the graph.
pub struct Value {
    pub(crate) storage: Storage,
    pub(crate) shape: Shape,
}

impl Value {
    /// The value as a tensor outside the graph.
    pub fn into_tensor(self) -> Tensor {
        Tensor::from_storage(self.storage, self.shape, candle_core::op::BackpropOp::none(), false)
    }

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

    /// The outputs that the backward pass wants to see again, by index.
    fn keeps(&self) -> &'static [usize] {
        &[]
    }

    /// Whether the gradients that the backward pass gives are new tensors which nothing else refers to, so that
    /// other gradients may be added to them in place.
    fn fresh(&self) -> bool {
        false
    }

    /// Computes the outputs from `args`. `save` is false when no backward pass can follow.
    fn forward(&self, args: &[Tensor], save: bool) -> Result<Forward>;

    /// The gradient of every argument, given `grads`, the gradient of every output, contiguous and of its shape (`None`:
    /// the output took no part in the loss). Gradients that `run.needs` does not ask for may be left out.
    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>>;
}

/// What the backward pass of a node sees of its forward pass.
pub struct Run {
    pub args: Vec<Tensor>,
    pub saved: Vec<Tensor>,
    /// The outputs that [`Node::keeps`] names, in its order.
    pub outputs: Vec<Tensor>,
    /// Which arguments want a gradient.
    pub needs: Vec<bool>,
    /// The arguments that are parameters. A backward pass may add to [`Param::grad`] itself and give no
    /// gradient for such an argument: a matrix product adds for nothing.
    pub params: Vec<Option<Param>>,
    /// What other users of an argument have given for its gradient so far, contiguous, in any shape. As with
    /// parameters, a backward pass may add to it itself.
    pub sums: Vec<Option<Tensor>>,
}

/// An argument of an operation: a tensor of the graph, or a parameter.
#[derive(Clone)]
pub enum Arg {
    Tensor(Tensor),
    /// A tensor seen in another shape; see [`view`].
    View(Tensor, Shape),
    Param(Param),
    /// A parameter, seen in the number format that matrix products compute in.
    Weight(Param),
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
            Arg::Weight(param) => param.weight().contiguous(),
        }
    }

    pub fn shape(&self) -> Shape {
        match self {
            Arg::Tensor(tensor) => tensor.shape().clone(),
            Arg::View(_, shape) => shape.clone(),
            Arg::Param(param) | Arg::Weight(param) => param.value().shape().clone(),
        }
    }

    /// The number format that activations computed from this argument have.
    pub fn compute_dtype(&self) -> DType {
        match self {
            Arg::Tensor(tensor) | Arg::View(tensor, _) => tensor.dtype(),
            Arg::Param(param) | Arg::Weight(param) => param.weight().dtype(),
        }
    }

    /// The argument as matrix products take it: a parameter in their number format.
    pub fn into_weight(self) -> Self {
        match self {
            Arg::Param(param) => Arg::Weight(param),
            other => other,
        }
    }

    /// The tensor on the graph.
    fn tensor(&self) -> Option<&Tensor> {
        match self {
            Arg::Tensor(tensor) | Arg::View(tensor, _) => Some(tensor),
            Arg::Param(_) | Arg::Weight(_) => None,
        }
    }

    fn param(&self) -> Option<&Param> {
        match self {
            Arg::Param(param) | Arg::Weight(param) => Some(param),
            Arg::Tensor(_) | Arg::View(..) => None,
        }
    }
}

/// Where an output's gradient comes together.
#[derive(Clone)]
struct Output {
    shared: Arc<Shared>,
    index: usize,
    /// The core's token, if the node is mixed: what a node that uses the output hangs on.
    token: Option<Tensor>,
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
    /// The gradient so far, if it may be added to in place.
    fn sum(&self) -> Option<Tensor> {
        match &self.shared.output_grads.lock().unwrap()[self.index] {
            Some(Sum { grad, own: true }) => Some(grad.clone()),
            _ => None,
        }
    }

    /// Adds to the gradient of the output. `fresh`: nothing else refers to `grad`.
    fn add(&self, grad: Tensor, fresh: bool) -> Result<()> {
        let slot = &mut self.shared.output_grads.lock().unwrap()[self.index];
        *slot = Some(match slot.take() {
            None => Sum { own: fresh && grad.is_contiguous(), grad },
            Some(Sum { grad: sum, own: true }) => {
                sum.inplace_op2(&grad.reshape(sum.shape())?.contiguous()?, &super::add::AddAssign)?;
                Sum { grad: sum, own: true }
            }
            Some(Sum { grad: first, own: false }) => {
                let grad = grad.reshape(first.shape())?;
                Sum { grad: super::add::sum(&first.contiguous()?, &grad.contiguous()?)?, own: true }
            }
        });
        if self.token.is_none() {
            PENDING.with(|pending| pending.borrow_mut().insert(self.shared.age, self.shared.clone()));
        }
        Ok(())
    }
}

/// Numbers the nodes as they are made: whoever uses an output is younger than who made it.
static AGE: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// Pure nodes with a gradient, by age.
    static PENDING: RefCell<BTreeMap<u64, Arc<Shared>>> = const { RefCell::new(BTreeMap::new()) };
}

/// Runs the waiting nodes that are no older than `age`, the youngest first, until none is left.
fn run_pending(age: u64) -> Result<()> {
    let next = || {
        PENDING.with(|pending| {
            let mut pending = pending.borrow_mut();
            if pending.last_key_value().is_some_and(|(last, _)| *last >= age) {
                pending.pop_last()
            } else {
                None
            }
        })
    };
    while let Some((_, shared)) = next() {
        if let Err(error) = shared.backward() {
            PENDING.with(|pending| pending.borrow_mut().clear());
            return Err(error);
        }
    }
    Ok(())
}

/// What the outputs of pure nodes on a device hang on: the last tensor that Candle's backward pass reaches,
/// which then runs them.
fn anchor(device: &Device) -> Result<Tensor> {
    static ANCHORS: LazyLock<Mutex<HashMap<DeviceLocation, Tensor>>> = LazyLock::new(Default::default);
    let mut anchors = ANCHORS.lock().unwrap();
    if let Some(anchor) = anchors.get(&device.location())
        && anchor.device().same_device(device)
    {
        return Ok(anchor.clone());
    }
    let anchor = Var::zeros(1, DType::F32, device)?.apply_op1(Anchor)?;
    anchors.insert(device.location(), anchor.clone());
    Ok(anchor)
}

struct Anchor;

impl CustomOp1 for Anchor {
    fn name(&self) -> &'static str {
        "anchor"
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok(token_storage())
    }
    fn cuda_fwd(&self, storage: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        cuda_token_storage(storage)
    }
    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        run_pending(0)?;
        Ok(None)
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

/// A variable whose gradient nodes hand over here, not to Candle: its users stay pure, as in a model, and what
/// they compute arrives without a sum or a copy. For checks and measurements.
pub struct Leaf {
    id: TensorId,
    age: u64,
    grad: Arc<Mutex<Option<Tensor>>>,
}

impl Leaf {
    /// Takes the gradient of `var` in what is computed from it from now on, once.
    pub fn of(var: &Var) -> Self {
        let grad = Arc::new(Mutex::new(None));
        let run =
            Run { args: vec![], saved: vec![], outputs: vec![], needs: vec![], params: vec![], sums: vec![] };
        let age = AGE.fetch_add(1, Ordering::Relaxed);
        let shared = Arc::new(Shared {
            node: Box::new(LeafNode(grad.clone())),
            age,
            run: Mutex::new(Some(run)),
            shapes: vec![var.shape().clone()],
            output_grads: Mutex::new(vec![None]),
            input_grads: Mutex::new(vec![]),
            targets: Mutex::new(vec![]),
        });
        let id = var.as_tensor().id();
        OUTPUTS.lock().unwrap().insert(id, Output { shared, index: 0, token: None });
        Self { id, age, grad }
    }

    /// The gradient, if one came.
    pub fn grad(&self) -> Option<Tensor> {
        self.grad.lock().unwrap().take()
    }
}

impl Drop for Leaf {
    fn drop(&mut self) {
        let _entry = OUTPUTS.lock().unwrap().remove(&self.id);
    }
}

struct LeafNode(Arc<Mutex<Option<Tensor>>>);

impl Node for LeafNode {
    fn name(&self) -> &'static str {
        "leaf"
    }
    fn forward(&self, _: &[Tensor], _: bool) -> Result<Forward> {
        Ok(Forward::default())
    }
    fn backward(&self, _: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        *self.0.lock().unwrap() = grads[0].clone();
        Ok(vec![])
    }
}

/// Runs the backward passes behind `outputs` of pure nodes, given their gradients, without a loss.
pub fn pull_back(outputs: &[(&Tensor, Tensor)]) -> Result<()> {
    pull_back_to(0, outputs)
}

/// [`pull_back`] that leaves what is older than `age` alone.
fn pull_back_to(age: u64, outputs: &[(&Tensor, Tensor)]) -> Result<()> {
    for (output, grad) in outputs {
        let entry = OUTPUTS.lock().unwrap().get(&output.id()).cloned();
        match entry {
            Some(entry) if entry.token.is_none() => entry.add(grad.clone(), false)?,
            _ => candle_core::bail!("a gradient for a tensor that is not the output of a pure node"),
        }
    }
    run_pending(age)
}

/// `f(x)`, of which only `x` is kept: the backward pass computes it once more (gradient checkpointing). The same
/// gradients, bit for bit, for less memory and more time.
///
/// `f` must compute the same each time, and be made of [`Node`]s alone.
pub fn recompute(
    x: &Tensor,
    f: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    Ok(apply(Recompute(f), &[Arg::from(x)])?.remove(0))
}

struct Recompute<F>(F);

impl<F: Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static> Node for Recompute<F> {
    fn name(&self) -> &'static str {
        "recompute"
    }

    fn fresh(&self) -> bool {
        true
    }

    fn forward(&self, args: &[Tensor], _: bool) -> Result<Forward> {
        let y = no_grad(|| (self.0)(&args[0]))?;
        let (storage, layout) = y.storage_and_layout();
        let value = Value { storage: storage.try_clone(layout)?, shape: y.shape().clone() };
        Ok(Forward { outputs: vec![value], saved: vec![] })
    }

    fn backward(&self, run: &Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let Some(grad) = &grads[0] else { return Ok(vec![None]) };
        let x = Var::from_tensor(&run.args[0])?;
        let leaf = Leaf::of(&x);
        let y = (self.0)(&x)?;
        pull_back_to(leaf.age, &[(&y, grad.clone())])?;
        Ok(vec![leaf.grad()])
    }
}

/// Applies `node` to `args` and puts the result on the tape.
pub fn apply<N: Node>(node: N, args: &[Arg]) -> Result<Vec<Tensor>> {
    let values: Vec<Tensor> = args.iter().map(Arg::value).collect::<Result<_>>()?;
    let recording = !NO_GRAD.with(Cell::get);
    let needs: Vec<bool> =
        args.iter().map(|arg| recording && arg.tensor().is_none_or(Tensor::track_op)).collect();
    let save = needs.contains(&true);
    let device = values[0].device().clone();
    let Forward { outputs, saved } = {
        let _range = trace::range(trace::Kind::Forward, node.name());
        node.forward(&values, save)?
    };
    if !save {
        return Ok(outputs.into_iter().map(Value::into_tensor).collect());
    }

    let targets: Vec<Target> = args
        .iter()
        .zip(&needs)
        .map(|(arg, needed)| match (arg.param(), arg.tensor()) {
            _ if !needed => Target::None,
            (Some(param), _) => Target::Param(param.clone()),
            (None, Some(tensor)) => match OUTPUTS.lock().unwrap().get(&tensor.id()) {
                Some(output) => Target::Output(output.clone()),
                None => Target::Candle(tensor.clone()),
            },
            (None, None) => Target::None,
        })
        .collect();
    // What a mixed node waits for: tensors from elsewhere, and tokens of the mixed nodes before it, each once.
    let mut edges: Vec<(Option<usize>, Tensor)> = Vec::new();
    let mut pure_inputs = false;
    for (i, target) in targets.iter().enumerate() {
        match target {
            Target::Candle(tensor) => edges.push((Some(i), tensor.clone())),
            Target::Output(Output { token: Some(token), .. }) => {
                if edges.iter().all(|(_, edge)| edge.id() != token.id()) {
                    edges.push((None, token.clone()));
                }
            }
            Target::Output(Output { token: None, .. }) => pure_inputs = true,
            Target::Param(_) | Target::None => {}
        }
    }
    let mixed = !edges.is_empty();
    if mixed && pure_inputs {
        edges.push((None, anchor(&device)?));
    }
    let keeps = node.keeps();
    let params = args.iter().map(|arg| arg.param().cloned()).collect();
    let shared = Arc::new(Shared {
        node: Box::new(node),
        age: AGE.fetch_add(1, Ordering::Relaxed),
        run: Mutex::new(Some(Run { args: values, saved, outputs: vec![], needs, params, sums: vec![] })),
        shapes: outputs.iter().map(|value| value.shape.clone()).collect(),
        output_grads: Mutex::new(vec![None; outputs.len()]),
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
    let token = token.map(|token| token.apply_op1(Core { shared: shared.clone() })).transpose()?;
    let base = match &token {
        Some(token) => token.clone(),
        None => anchor(&device)?,
    };
    let outputs: Vec<Tensor> = outputs
        .into_iter()
        .enumerate()
        .map(|(index, value)| {
            let output = Output { shared: shared.clone(), index, token: token.clone() };
            let emit =
                Emit { value: Mutex::new(Some(value)), output: output.clone(), id: Default::default() };
            let id = emit.id.clone();
            let tensor = base.apply_op1(emit)?;
            OUTPUTS.lock().unwrap().insert(tensor.id(), output);
            let _ = id.set(tensor.id());
            Ok(tensor)
        })
        .collect::<Result<_>>()?;
    if let Some(run) = &mut *shared.run.lock().unwrap() {
        run.outputs = keeps.iter().map(|&i| outputs[i].detach()).collect();
    }
    Ok(outputs)
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
    age: u64,
    run: Mutex<Option<Run>>,
    targets: Mutex<Vec<Target>>,
    /// The shapes of the outputs, and what has come of their gradients.
    shapes: Vec<Shape>,
    output_grads: Mutex<Vec<Option<Sum>>>,
    input_grads: Mutex<Vec<Option<Tensor>>>,
}

impl Shared {
    /// Runs the node's backward pass on what came together, and passes its gradients on.
    fn backward(&self) -> Result<()> {
        // Taken, not borrowed: what the forward pass kept is freed as the backward pass moves on.
        let Some(mut run) = self.run.lock().unwrap().take() else {
            candle_core::bail!("{}: backward was called twice on one graph", self.node.name())
        };
        // A view of an output may have given its gradient another shape.
        let whole = |(sum, shape): (&mut Option<Sum>, &Shape)| {
            sum.take().map(|sum| sum.grad.contiguous()?.reshape(shape)).transpose()
        };
        let output_grads: Vec<Option<Tensor>> = (self.output_grads.lock().unwrap().iter_mut())
            .zip(&self.shapes)
            .map(whole)
            .collect::<Result<_>>()?;
        // Taken as well: with the links gone, nodes are freed one by one, not in a deep recursion.
        let targets = std::mem::take(&mut *self.targets.lock().unwrap());
        run.sums = targets
            .iter()
            .map(|target| match target {
                Target::Output(output) => output.sum(),
                _ => None,
            })
            .collect();
        let grads = {
            let _range = trace::range(trace::Kind::Backward, self.node.name());
            self.node.backward(&run, &output_grads)?
        };
        for (i, (target, grad)) in targets.into_iter().zip(grads).enumerate() {
            let Some(grad) = grad else { continue };
            match target {
                Target::None => {}
                Target::Param(param) => param.accumulate(&grad)?,
                Target::Output(output) => output.add(grad, self.node.fresh())?,
                Target::Candle(tensor) => {
                    self.input_grads.lock().unwrap()[i] = Some(grad.reshape(tensor.shape())?);
                }
            }
        }
        Ok(())
    }
}

/// A one-element tensor: what Candle's tape carries instead of the node's tensors.
fn token_storage() -> (CpuStorage, Shape) {
    (CpuStorage::F32(vec![0.0]), Shape::from(1))
}

#[cfg(feature = "cuda")]
fn cuda_token_storage(near: &CudaStorage) -> Result<(CudaStorage, Shape)> {
    let token = near.device.alloc_zeros::<f32>(1)?;
    Ok((CudaStorage::wrap_cuda_slice(token, near.device.clone()), Shape::from(1)))
}

#[cfg(not(feature = "cuda"))]
fn cuda_token_storage(_: &CudaStorage) -> Result<(CudaStorage, Shape)> {
    candle_core::bail!("{}", crate::device::NO_CUDA)
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
    fn cuda_fwd(&self, a: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        cuda_token_storage(a)
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
    fn cuda_fwd(
        &self,
        a: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        cuda_token_storage(a)
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
    fn cuda_fwd(
        &self,
        a: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        cuda_token_storage(a)
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

/// A mixed node, seen by Candle's tape as token in, token out.
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
    fn cuda_fwd(&self, token: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        cuda_token_storage(token)
    }
    fn bwd(&self, token: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        self.shared.backward()?;
        Ok(Some(token_grad(token)?))
    }
}

/// One output of a node: takes the core's token or the anchor, gives the tensor that the forward pass made.
struct Emit {
    value: Mutex<Option<Value>>,
    output: Output,
    /// The tensor that this became.
    id: Arc<OnceLock<TensorId>>,
}

impl Emit {
    fn take(&self) -> (Storage, Shape) {
        let value = self.value.lock().unwrap().take();
        let Value { storage, shape } = value.expect("an Emit is applied once");
        (storage, shape)
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
        self.output.shared.node.name()
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        match self.take() {
            (Storage::Cpu(storage), shape) => Ok((storage, shape)),
            _ => candle_core::bail!("{}: the output is not on the CPU", CustomOp1::name(self)),
        }
    }
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        match self.take() {
            (Storage::Cuda(storage), shape) => Ok((storage, shape)),
            _ => candle_core::bail!("{}: the output is not on the GPU", CustomOp1::name(self)),
        }
    }
    fn bwd(&self, token: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        self.output.add(grad.clone(), false)?;
        Ok(Some(token_grad(token)?))
    }
}
