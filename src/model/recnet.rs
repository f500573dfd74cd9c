//! The stack: encoder, layers, decoder.
//!
//! The authors': x = encoder(u); for each layer x = LayerNorm(x + dropout(mixer(x))); logits = decoder(x). With
//! `model.block: layered` the layers are those of language models, x = x + dropout(mixer(RMSNorm(x))) and then
//! x = x + dropout(MLP(RMSNorm(x))), and the decoder takes RMSNorm(x).

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};

use super::block::{Dropouts, Layer, final_norm, normed};
use super::{Builder, Call, Dims, Init, LayerState, Model, Notes, Param, ParamStore, find};
use crate::config::ModelConfig;
use crate::ops::dropout::Dropout;
use crate::ops::tape::recompute;
use crate::ops::{Arg, embedding, linear};

/// What goes in.
pub enum Input<'a> {
    /// u32 [B, T]: the symbol shown at each step; anything from the number of features on is a blank.
    Ids(&'a Tensor),
    /// [B, T, features].
    Dense(&'a Tensor),
}

/// Where dropout masks come from: the same for a batch and for its micro-batches, on every device.
#[derive(Clone, Copy, Debug)]
pub struct DropoutKey {
    pub p: f64,
    /// From the run's seed and the update.
    pub key: [u32; 2],
    /// Index inside the batch of the first sample given.
    pub first: u32,
}

/// How a forward pass is meant.
#[derive(Clone, Default)]
pub struct Context {
    /// Set while training.
    pub dropout: Option<DropoutKey>,
    /// Set to evaluate a sequence in pieces; start with `Some(State::default())`.
    pub state: Option<State>,
    /// Keep the input of each layer alone for the backward pass, which computes the layer again; not with a state.
    pub recompute: bool,
}

impl Context {
    /// For sequences that come in pieces: each forward pass goes on where the last one ended.
    pub fn streaming() -> Self {
        Self { state: Some(State::default()), ..Self::default() }
    }
}

/// What all layers carry from one piece to the next.
#[derive(Clone, Default)]
pub struct State {
    layers: Vec<LayerState>,
    /// Timesteps of the pieces so far.
    steps: usize,
}

/// A stack of mixers with its parameters.
pub struct RecNet {
    config: ModelConfig,
    features: usize,
    classes: usize,
    encoder: (Param, Param),
    layers: Vec<Arc<Layer>>,
    norm: Option<Param>,
    decoder: (Param, Param),
    params: ParamStore,
}

/// The parts of a stack, declared but without values.
pub(super) struct Declared {
    encoder: (Param, Param),
    layers: Vec<Arc<Layer>>,
    norm: Option<Param>,
    decoder: (Param, Param),
}

pub(super) fn declare(
    model: &Model,
    config: &ModelConfig,
    features: usize,
    classes: usize,
    builder: &Builder,
) -> anyhow::Result<Declared> {
    let dims = Dims::new(model, config)?;
    let width = dims.width;
    let affine = |name: &str, rows: usize, columns: usize| {
        let b = builder.push(name);
        let weight = b.param("weight", &[rows, columns], Init::linear(columns));
        (weight, b.param("bias", &[rows], Init::linear(columns)))
    };
    let encoder = affine("encoder", width, features);
    let layers = (0..config.layers).map(|l| Layer::new(model, &dims, builder, l).map(Arc::new));
    let layers = layers.collect::<anyhow::Result<Vec<_>>>()?;
    let norm = final_norm(&dims, builder);
    let decoder = affine("decoder", classes, width);
    Ok(Declared { encoder, layers, norm, decoder })
}

impl RecNet {
    /// Builds the configured model with fresh parameters drawn from `seed`; activations are of type `dtype`.
    pub fn new(
        config: &ModelConfig,
        features: usize,
        classes: usize,
        seed: u64,
        dtype: DType,
        device: &Device,
    ) -> anyhow::Result<Self> {
        Self::with_model(find(&config.name)?, config, features, classes, seed, dtype, device)
    }

    /// [`RecNet::new`] with a model that need not be in the registry.
    pub fn with_model(
        model: &Model,
        config: &ModelConfig,
        features: usize,
        classes: usize,
        seed: u64,
        dtype: DType,
        device: &Device,
    ) -> anyhow::Result<Self> {
        let builder = Builder::new();
        let Declared { encoder, layers, norm, decoder } =
            declare(model, config, features, classes, &builder)?;
        let params = builder.finish(seed, dtype, device)?;
        Ok(Self { config: config.clone(), features, classes, encoder, layers, norm, decoder, params })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The type of activations.
    pub fn dtype(&self) -> DType {
        self.encoder.0.weight().dtype()
    }

    /// Width of the input.
    pub fn features(&self) -> usize {
        self.features
    }

    pub fn classes(&self) -> usize {
        self.classes
    }

    pub fn params(&self) -> &ParamStore {
        &self.params
    }

    /// Weight [classes, width] and bias \[classes\] of the last linear layer.
    pub fn decoder(&self) -> (&Param, &Param) {
        (&self.decoder.0, &self.decoder.1)
    }

    /// Takes weights by name; every name and shape must match.
    pub fn load(&self, tensors: &HashMap<String, Tensor>) -> anyhow::Result<()> {
        self.params.load(tensors)?;
        self.layers.iter().try_for_each(|layer| layer.check_weights())
    }

    /// What the decoder takes, [B, T, width].
    pub fn hidden(&self, input: Input, context: &mut Context) -> Result<Tensor> {
        self.watch(input, context, |_, _| Ok(()))
    }

    /// [`RecNet::hidden`], with a look at the output of every part that is kept: `see(name, tensor)`.
    pub fn watch(
        &self,
        input: Input,
        context: &mut Context,
        see: impl FnMut(&str, &Tensor) -> Result<()>,
    ) -> Result<Tensor> {
        self.layers(input, context, see, None)
    }

    fn layers(
        &self,
        input: Input,
        context: &mut Context,
        mut see: impl FnMut(&str, &Tensor) -> Result<()>,
        mut notes: Option<&mut Notes>,
    ) -> Result<Tensor> {
        let (weight, bias) = &self.encoder;
        let mut x = match input {
            Input::Ids(ids) => embedding::embedding(ids, weight, bias)?,
            Input::Dense(u) => linear::linear(u, weight, Some(Arg::from(bias)))?,
        };
        see("encoder", &x)?;
        let mut position = 0;
        if let Some(state) = &mut context.state {
            state.layers.resize_with(self.layers.len(), LayerState::default);
            position = state.steps;
            state.steps += x.dim(1)?;
        }
        for (l, layer) in self.layers.iter().enumerate() {
            let dropout = |site: usize| {
                let DropoutKey { p, key, first } = context.dropout?;
                (p > 0.0).then_some(Dropout { p, key, site: site as u32, first, tied: false })
            };
            // Two sites a layer: what the mixer drops inside, and what the residual branch drops; those of the MLPs
            // stand behind all of them.
            let inside = dropout(2 * l);
            let drop = Dropouts { mixer: dropout(2 * l + 1), mlp: dropout(2 * self.layers.len() + l) };
            x = if context.recompute {
                let layer = layer.clone();
                let forward = move |x: &Tensor| {
                    layer.forward(l, x, &mut Call::new(inside, None), &drop, &mut |_, _| Ok(()))
                };
                recompute(&x, forward)?
            } else {
                let slots = context.state.as_mut().map(|state| &mut state.layers[l]);
                if let Some(notes) = &mut notes {
                    notes.layer = l;
                }
                let mut call = Call::new(inside, slots).at(position).with_notes(notes.as_deref_mut());
                layer.forward(l, &x, &mut call, &drop, &mut see)?
            };
        }
        if let Some(norm) = &self.norm {
            x = normed(&x, norm)?;
            see("norm", &x)?;
        }
        if let Some(notes) = notes {
            notes.end_piece(x.dims()[1]);
        }
        Ok(x)
    }

    /// [B, T, classes].
    pub fn logits(&self, input: Input, context: &mut Context) -> Result<Tensor> {
        self.decode(&self.hidden(input, context)?)
    }

    /// [`RecNet::logits`] of one sequence, while its layers tell of themselves.
    pub fn inspect(&self, input: Input, context: &mut Context, notes: &mut Notes) -> Result<Tensor> {
        self.decode(&self.layers(input, context, |_, _| Ok(()), Some(notes))?)
    }

    /// The logits [B, T, classes] of [`RecNet::hidden`].
    pub fn decode(&self, hidden: &Tensor) -> Result<Tensor> {
        let (weight, bias) = &self.decoder;
        linear::linear(hidden, weight, Some(Arg::from(bias)))
    }
}
