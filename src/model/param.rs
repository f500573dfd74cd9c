//! Parameters: names and shapes as in the PyTorch layers, values and gradients in two flat buffers.
//!
//! A model is built twice over the same code path without noticing: its constructor declares parameters
//! through a [`Builder`], which hands out [`Param`] handles; [`Builder::finish`] then lays all of them
//! out in one flat buffer, in the order of their declaration, and draws their initial values. Clipping
//! and the optimizer run over the flat buffers; views of them are what the operations see.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, OnceLock};

use candle_core::{DType, Device, Result, Tensor};

use crate::ops::philox::philox4x32;
use crate::{bail_input, dispatch};

/// How a parameter's initial values are drawn.
#[derive(Clone, Debug)]
pub enum Init {
    /// The same value everywhere.
    Const(f64),
    /// Uniform in ±bound.
    Uniform(f64),
    /// Uniform in [low, high).
    Between(f64, f64),
    /// Normal, of this deviation.
    Normal(f64),
    /// Each row holds log 1, log 2, …, log of the row's length (S4D-real, Mamba's `A_log`).
    LogArange,
    /// log of a uniform number in (low, high) (`A_log` of Mamba-2 and the gated delta family).
    LogUniform(f64, f64),
    /// The inverse softplus of a step size drawn log-uniformly from [low, high], at least `floor`.
    InverseSoftplus { low: f64, high: f64, floor: f64 },
    /// Given values, in row-major order.
    Values(Vec<f64>),
}

impl Init {
    /// PyTorch's default for a linear layer's weight and bias: U(±1/√fan_in).
    pub fn linear(fan_in: usize) -> Self {
        Init::Uniform(1.0 / (fan_in as f64).sqrt())
    }

    /// Mamba's step sizes: log-uniform in [1e-3, 0.1], at least 1e-4, through the inverse softplus.
    pub fn step_size() -> Self {
        Init::InverseSoftplus { low: 1e-3, high: 0.1, floor: 1e-4 }
    }

    fn draw(&self, shape: &[usize], mut uniform: impl FnMut() -> f64) -> Vec<f64> {
        let n: usize = shape.iter().product();
        match self {
            Init::Const(value) => vec![*value; n],
            Init::Uniform(bound) => (0..n).map(|_| bound * (2.0 * uniform() - 1.0)).collect(),
            Init::Between(low, high) => (0..n).map(|_| low + (high - low) * uniform()).collect(),
            // Box and Muller.
            Init::Normal(deviation) => (0..n)
                .map(|_| {
                    let radius = (-2.0 * (1.0 - uniform()).ln()).sqrt();
                    deviation * radius * (std::f64::consts::TAU * uniform()).cos()
                })
                .collect(),
            Init::LogArange => {
                let row = *shape.last().unwrap_or(&1);
                (0..n).map(|i| ((i % row + 1) as f64).ln()).collect()
            }
            Init::LogUniform(low, high) => (0..n).map(|_| (low + (high - low) * uniform()).ln()).collect(),
            Init::InverseSoftplus { low, high, floor } => (0..n)
                .map(|_| {
                    let dt = (low.ln() + (high.ln() - low.ln()) * uniform()).exp().max(*floor);
                    dt + (-(-dt).exp_m1()).ln()
                })
                .collect(),
            Init::Values(values) => values.clone(),
        }
    }
}

struct Placed {
    value: Tensor,
    grad: Tensor,
    /// The value in the number format of matrix products, where that is not its own.
    shadow: Option<Tensor>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Trained,
    /// In checkpoints, but not trained.
    Buffer,
    /// Neither: it is never anything else.
    Constant,
}

struct Spec {
    name: String,
    shape: Vec<usize>,
    init: Init,
    role: Role,
    /// The largest learning rate of a parameter that has its own, and no weight decay.
    most_rate: Option<f64>,
    placed: OnceLock<Placed>,
}

/// A handle to one named parameter, or to some of its rows; cheap to clone.
#[derive(Clone)]
pub struct Param {
    spec: Arc<Spec>,
    rows: Option<(usize, usize)>,
    /// Seen without its last dimension, which is 1.
    matrix: bool,
}

impl Param {
    /// Whether both are handles to one parameter.
    fn is(&self, other: &Param) -> bool {
        Arc::ptr_eq(&self.spec, &other.spec)
    }

    fn placed(&self) -> &Placed {
        self.spec.placed.get().expect("a parameter is used after Builder::finish")
    }

    /// Rows `start..start + len` of the first dimension, sharing value and gradient with the whole: a
    /// layer can keep PyTorch's fused weight and still treat its parts one by one.
    pub fn rows(&self, start: usize, len: usize) -> Param {
        assert!(self.rows.is_none() && start + len <= self.spec.shape[0], "rows of {}", self.spec.name);
        Param { rows: Some((start, len)), ..self.clone() }
    }

    /// The weight of a convolution of one tap, [O, I, 1], as the matrix that it is.
    pub fn matrix(&self) -> Param {
        assert!(self.spec.shape.last() == Some(&1), "{} as a matrix", self.spec.name);
        Param { matrix: true, ..self.clone() }
    }

    fn view(&self, whole: &Tensor) -> Tensor {
        let seen = match self.rows {
            None => whole.clone(),
            Some((start, len)) => whole.narrow(0, start, len).expect("checked when the rows were taken"),
        };
        let last = candle_core::D::Minus1;
        if self.matrix { seen.squeeze(last).expect("checked when it was made a matrix") } else { seen }
    }

    /// The full name, as in the PyTorch state_dict.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// The shape of the whole parameter.
    pub fn shape(&self) -> &[usize] {
        &self.spec.shape
    }

    /// False for buffers that a checkpoint holds but training leaves alone.
    pub fn trained(&self) -> bool {
        self.spec.role == Role::Trained
    }

    /// A view of the current value, outside the graph.
    pub fn value(&self) -> Tensor {
        self.view(&self.placed().value)
    }

    /// A view of the gradient summed up since the last [`ParamStore::zero_grad`].
    pub fn grad(&self) -> Tensor {
        self.view(&self.placed().grad)
    }

    /// A view of the value as matrix products take it: in bf16 if the store computes in bf16.
    pub fn weight(&self) -> Tensor {
        let placed = self.placed();
        self.view(placed.shadow.as_ref().unwrap_or(&placed.value))
    }

    /// Adds to the gradient.
    pub fn accumulate(&self, grad: &Tensor) -> Result<()> {
        let own = self.grad();
        if grad.elem_count() != own.elem_count() {
            candle_core::bail!(
                "gradient of {}: expected shape {:?}, got {:?}",
                self.name(),
                self.shape(),
                grad.shape()
            )
        }
        own.inplace_op2(&grad.contiguous()?, &crate::ops::add::AddAssign)
    }

    /// The parameter as a tensor of the graph, for mixers written with Candle's own operations.
    pub fn tensor(&self) -> Result<Tensor> {
        crate::ops::tape::apply(Identity, &[crate::ops::Arg::from(self)]).map(|mut out| out.remove(0))
    }
}

/// Copies a parameter onto the tape.
struct Identity;

impl crate::ops::Node for Identity {
    fn name(&self) -> &'static str {
        "parameter"
    }
    fn forward(&self, args: &[Tensor], _: bool) -> Result<crate::ops::tape::Forward> {
        let x = &args[0];
        let value = dispatch!(x.dtype(), F => {
            crate::slices!(F; data = x);
            crate::ops::tape::Value::cpu(data.to_vec(), x.shape().clone())
        });
        Ok(crate::ops::tape::Forward { outputs: vec![value], saved: vec![] })
    }
    fn backward(&self, _: &crate::ops::tape::Run, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        Ok(grads.to_vec())
    }
}

/// Refuses weights that lack a parameter, have it in another shape, or hold more.
fn check<'a>(
    params: impl Iterator<Item = &'a Param> + Clone,
    tensors: &HashMap<String, Tensor>,
) -> anyhow::Result<()> {
    for param in params.clone() {
        let Some(tensor) = tensors.get(param.name()) else {
            bail_input!("the weights lack the tensor {} of shape {:?}", param.name(), param.shape())
        };
        if tensor.dims() != param.shape() {
            bail_input!(
                "the tensor {} has shape {:?} in the weights, but this model needs {:?}",
                param.name(),
                tensor.dims(),
                param.shape()
            )
        }
    }
    let known: HashSet<&str> = params.map(Param::name).collect();
    if let Some(name) = tensors.keys().filter(|name| !known.contains(name.as_str())).min() {
        bail_input!("the weights hold a tensor {name} that this model does not have")
    }
    Ok(())
}

/// Declares parameters under a path of names.
pub struct Builder {
    prefix: String,
    declared: Arc<Mutex<Declared>>,
}

#[derive(Default)]
struct Declared {
    params: Vec<Param>,
    /// Each with its members.
    stacks: Vec<(Param, Vec<Param>)>,
}

impl Declared {
    /// The parameters in groups that lie side by side: the members of a stack, where its first one stands, and every
    /// other one alone.
    fn groups(&self) -> Vec<Vec<Param>> {
        let of = |param: &Param| {
            self.stacks.iter().find(|(_, members)| members.iter().any(|member| member.is(param)))
        };
        let group = |param: &Param| match of(param) {
            None => Some(vec![param.clone()]),
            Some((_, members)) if members[0].is(param) => Some(members.clone()),
            Some(_) => None,
        };
        self.params.iter().filter_map(group).collect()
    }
}

impl Default for Builder {
    fn default() -> Self {
        Self::new()
    }
}

impl Builder {
    pub fn new() -> Self {
        Self { prefix: String::new(), declared: Default::default() }
    }

    /// A builder whose names begin with this one's prefix and `name`.
    pub fn push(&self, name: impl std::fmt::Display) -> Builder {
        Builder { prefix: format!("{}{name}.", self.prefix), declared: self.declared.clone() }
    }

    /// Declares a trained parameter.
    pub fn param(&self, name: &str, shape: &[usize], init: Init) -> Param {
        self.add(name, shape, init, Role::Trained, None)
    }

    /// Declares a trained parameter whose learning rate is never above `most_rate`, and which has no weight decay.
    pub fn slow_param(&self, name: &str, shape: &[usize], init: Init, most_rate: f64) -> Param {
        self.add(name, shape, init, Role::Trained, Some(most_rate))
    }

    /// Declares values that a checkpoint holds but training leaves alone.
    pub fn buffer(&self, name: &str, shape: &[usize], init: Init) -> Param {
        self.add(name, shape, init, Role::Buffer, None)
    }

    /// Declares values that stand in for a parameter which the model does not have; no checkpoint holds them.
    pub fn constant(&self, name: &str, shape: &[usize], init: Init) -> Param {
        self.add(name, shape, init, Role::Constant, None)
    }

    fn add(&self, name: &str, shape: &[usize], init: Init, role: Role, most_rate: Option<f64>) -> Param {
        let name = format!("{}{name}", self.prefix);
        let spec = Spec { name, shape: shape.to_vec(), init, role, most_rate, placed: OnceLock::new() };
        let param = Param { spec: Arc::new(spec), rows: None, matrix: false };
        self.declared.lock().unwrap().params.push(param.clone());
        param
    }

    /// The rows of several parameters, of one kind and width, as those of one: what shares an input is one matrix
    /// product. Checkpoints know the members alone.
    ///
    /// Behind the last member follow as many rows of zeros as make a multiple of `multiple`: with 8 the rows of a
    /// product are aligned. They stay zero as long as nothing gives them a gradient.
    pub fn stack(&self, members: &[&Param], multiple: usize) -> Param {
        let spec = &members[0].spec;
        let alike = |member: &&Param| {
            member.rows.is_none() && member.shape()[1..] == spec.shape[1..] && member.spec.role == spec.role
        };
        assert!(members.iter().all(alike), "the members of a stack differ from {}", spec.name);
        let mut shape = spec.shape.clone();
        shape[0] = members.iter().map(|member| member.shape()[0]).sum::<usize>().next_multiple_of(multiple);
        let names: Vec<&str> = members.iter().map(|member| member.name()).collect();
        let spec = Spec {
            name: names.join("+"),
            shape,
            init: Init::Const(0.0),
            role: spec.role,
            most_rate: None,
            placed: OnceLock::new(),
        };
        let stack = Param { spec: Arc::new(spec), rows: None, matrix: false };
        let members = members.iter().map(|&member| member.clone()).collect();
        self.declared.lock().unwrap().stacks.push((stack.clone(), members));
        stack
    }

    /// Number of trained values declared so far.
    pub fn declared(&self) -> usize {
        let declared = self.declared.lock().unwrap();
        declared.params.iter().filter(|p| p.trained()).map(|p| p.shape().iter().product::<usize>()).sum()
    }

    /// Refuses weights that do not fit what was declared; nothing is allocated.
    pub fn check(&self, tensors: &HashMap<String, Tensor>) -> anyhow::Result<()> {
        let declared = self.declared.lock().unwrap();
        check(declared.params.iter().filter(|param| param.spec.role != Role::Constant), tensors)
    }

    /// Lays the declared parameters out, trained ones first, and draws their values from `seed`.
    ///
    /// `dtype` is what the model computes in; with bf16 the values themselves stay f32, and matrix products
    /// take them from a bf16 copy. Every parameter has a random stream of its own, found from its name:
    /// adding one leaves the others' values.
    pub fn finish(self, seed: u64, dtype: DType, device: &Device) -> Result<ParamStore> {
        let declared = std::mem::take(&mut *self.declared.lock().unwrap());
        let (mut trained, others): (Vec<_>, Vec<_>) =
            declared.groups().into_iter().partition(|group| group[0].trained());
        // Those with a learning rate of their own stand together at the end, for one update each of either kind.
        let rate = |group: &Vec<Param>| group[0].spec.most_rate;
        trained.sort_by(|a, b| rate(a).partial_cmp(&rate(b)).expect("rates are numbers"));
        let size = |param: &Param| param.spec.shape.iter().product::<usize>();
        let mut values = Vec::new();
        let mut placed: Vec<(&Param, usize)> = Vec::new();
        let mut end = 0;
        let mut groups: Vec<Group> = Vec::new();
        for group in trained.iter().chain(&others) {
            let begin = values.len();
            for param in group {
                let mut stream = Stream::new(seed, param.name());
                placed.push((param, values.len()));
                values.extend(param.spec.init.draw(param.shape(), || stream.next_f64()));
            }
            if let Some((stack, _)) = declared.stacks.iter().find(|(_, members)| members[0].is(&group[0])) {
                values.resize(begin + size(stack), 0.0);
            }
            values.resize(values.len().next_multiple_of(ALIGN), 0.0);
            if group[0].trained() {
                let (start, most_rate) = (end, rate(group));
                end = values.len();
                match groups.last_mut() {
                    Some(group) if group.most_rate == most_rate => group.len += end - start,
                    _ => groups.push(Group { start, len: end - start, most_rate }),
                }
            }
        }
        for (stack, members) in &declared.stacks {
            let first = placed.iter().find(|(param, _)| param.is(&members[0]));
            let (_, offset) = *first.expect("the members of a stack were declared");
            placed.push((stack, offset));
        }
        let total = values.len();
        let flat = Tensor::from_vec(values, total, &Device::Cpu)?;
        let half = dtype == DType::BF16;
        let flat = flat.to_dtype(if half { DType::F32 } else { dtype })?.to_device(device)?;
        let shadow = if half { Some(flat.to_dtype(dtype)?) } else { None };
        let grad = flat.zeros_like()?;
        for (param, offset) in placed {
            let view =
                |flat: &Tensor| flat.narrow(0, offset, size(param))?.reshape(param.spec.shape.as_slice());
            let placed = Placed {
                value: view(&flat)?,
                grad: view(&grad)?,
                shadow: shadow.as_ref().map(view).transpose()?,
            };
            if param.spec.placed.set(placed).is_err() {
                candle_core::bail!("parameter {} was laid out twice", param.name())
            }
        }
        let value = flat.narrow(0, 0, end)?;
        let gradient = grad.narrow(0, 0, end)?;
        let shadow = shadow.map(|shadow| shadow.narrow(0, 0, end)).transpose()?;
        let params: Vec<Param> = trained.into_iter().flatten().collect();
        let buffers = others.into_iter().flatten().filter(|param| param.spec.role == Role::Buffer).collect();
        let count = params.iter().map(size).sum();
        Ok(ParamStore { params, buffers, groups, value, gradient, shadow, count })
    }
}

/// Parameters and stacks begin at multiples of this many values, so that vectors and matrix products find them
/// aligned; the values between two of them are zero and stay so.
const ALIGN: usize = 8;

/// Uniform numbers in [0, 1) for one named parameter.
struct Stream {
    key: [u32; 2],
    tag: [u32; 2],
    index: u64,
}

impl Stream {
    fn new(seed: u64, name: &str) -> Self {
        use sha2::{Digest, Sha256};
        let hash = Sha256::digest(name.as_bytes());
        let word = |i: usize| u32::from_le_bytes(hash[4 * i..4 * i + 4].try_into().expect("four bytes"));
        Self { key: [seed as u32, (seed >> 32) as u32], tag: [word(0), word(1)], index: 0 }
    }

    fn next_f64(&mut self) -> f64 {
        let i = self.index;
        self.index += 1;
        let x = philox4x32([i as u32, (i >> 32) as u32, self.tag[0], self.tag[1]], self.key);
        let bits = (x[0] as u64) << 32 | x[1] as u64;
        (bits >> 11) as f64 * (1.0 / 9_007_199_254_740_992.0)
    }
}

/// A stretch of the flat buffers whose values are updated in the same way.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Group {
    pub start: usize,
    pub len: usize,
    /// The largest learning rate, of parameters that have their own and no weight decay.
    pub most_rate: Option<f64>,
}

impl Group {
    /// This stretch of a flat buffer.
    pub fn of(&self, flat: &Tensor) -> Result<Tensor> {
        flat.narrow(0, self.start, self.len)
    }
}

/// All parameters of a model, over flat buffers.
pub struct ParamStore {
    params: Vec<Param>,
    buffers: Vec<Param>,
    groups: Vec<Group>,
    value: Tensor,
    gradient: Tensor,
    shadow: Option<Tensor>,
    count: usize,
}

impl ParamStore {
    /// The trained parameters, in the order of the flat buffer.
    pub fn params(&self) -> &[Param] {
        &self.params
    }

    /// The untrained values that a checkpoint holds besides.
    pub fn buffers(&self) -> &[Param] {
        &self.buffers
    }

    /// The flat buffer in stretches that are updated alike; all of them together are all of it.
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// Number of trained values.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The copy of [`ParamStore::value`] that matrix products take, if they compute in bf16.
    pub fn shadow(&self) -> Option<&Tensor> {
        self.shadow.as_ref()
    }

    /// Brings the copy up to date after values were written from outside.
    pub fn refresh(&self) -> Result<()> {
        match &self.shadow {
            Some(shadow) => shadow.slice_set(&self.value.to_dtype(shadow.dtype())?, 0, 0),
            None => Ok(()),
        }
    }

    /// All trained values, flat, with zeros between parameters that end at odd places.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// All gradients, flat.
    pub fn gradient(&self) -> &Tensor {
        &self.gradient
    }

    /// Sets every gradient to zero.
    pub fn zero_grad(&self) -> Result<()> {
        self.gradient.zero_set()
    }

    /// Every parameter and buffer by name, as a checkpoint holds them.
    pub fn named(&self) -> impl Iterator<Item = &Param> + Clone {
        self.params.iter().chain(&self.buffers)
    }

    /// Copies values in by name. Every name must be there with its shape, and no other.
    pub fn load(&self, tensors: &HashMap<String, Tensor>) -> anyhow::Result<()> {
        check(self.named(), tensors)?;
        for param in self.named() {
            let own = param.value();
            let tensor = tensors[param.name()].to_dtype(own.dtype())?.to_device(own.device())?;
            own.slice_set(&tensor.contiguous()?, 0, 0)?;
        }
        Ok(self.refresh()?)
    }
}
