//! A call in parts: sequences of different lengths one after the other, and heads with methods of their own.

use core::ops::Range;

use crate::error::{Error, ErrorKind, Result, invalid};
use crate::params::{Method, Params};
use crate::part::Section;
use crate::plan::{Plan, Run};
use crate::problem::{Layouts, Problem, check_scalars};
use crate::simd::Kernels;
use crate::tiling::HeadSet;
use crate::view::TensorLayout;

/// How a call is divided, beyond batch items and heads. By default it is not.
#[derive(Debug, Clone, Copy, Default)]
pub struct Division<'a> {
    /// Sequences in the rows of the only batch item.
    pub sequences: Option<Sequences<'a>>,
    /// A method for each query head, instead of [`Params::method`]. A block mask then concerns the heads whose method
    /// is [`Method::Paper`] or [`Method::Auto`].
    pub head_methods: Option<&'a [Method]>,
}

/// Sequences that lie one after the other in the rows of one batch item. Each is computed as if it were alone.
#[derive(Debug, Clone, Copy)]
pub struct Sequences<'a> {
    /// For each sequence the number of its first query, and in the end the number of all queries: ascending from 0.
    pub cu_seqlens_q: &'a [i32],
    /// The same for keys.
    pub cu_seqlens_k: &'a [i32],
}

impl Sequences<'_> {
    /// How many there are.
    pub fn count(&self) -> usize {
        self.cu_seqlens_q.len().saturating_sub(1)
    }

    /// Checks them, and the shapes of what has one number for each head of each sequence, against the other tensors.
    pub fn check(&self, q: &TensorLayout, k: &TensorLayout, masked: bool) -> Result<()> {
        let count = self.count();
        if count == 0 || self.cu_seqlens_k.len() != count + 1 {
            invalid!(
                "cu_seqlens_q has {} entries and cu_seqlens_k {}; both have num_sequences + 1, at least 2",
                self.cu_seqlens_q.len(),
                self.cu_seqlens_k.len()
            );
        }
        if q.shape[0] != 1 {
            invalid!(
                "num_sequences = {count} but q.shape[0] (batch) = {}; sequences lie in the rows of one batch item",
                q.shape[0]
            );
        }
        if masked {
            invalid!(
                "block_mask is given with num_sequences = {count}; its blocks are those of a single sequence"
            );
        }
        for (name, starts, tensor, rows) in [
            ("cu_seqlens_q", self.cu_seqlens_q, "q", q.shape[2]),
            ("cu_seqlens_k", self.cu_seqlens_k, "k", k.shape[2]),
        ] {
            if starts[0] != 0 {
                invalid!("{name}[0] = {} must be 0", starts[0]);
            }
            if let Some(at) = starts.windows(2).position(|pair| pair[1] < pair[0]) {
                let (before, after) = (starts[at], starts[at + 1]);
                invalid!("{name}[{}] = {after} is less than {name}[{at}] = {before}", at + 1);
            }
            if i64::from(starts[count]) != rows {
                invalid!("{name}[{count}] = {} must be {tensor}.shape[2] = {rows}", starts[count]);
            }
        }
        Ok(())
    }

    /// A tensor of one number for each head has a row of them for each sequence.
    pub fn check_of_heads(&self, name: &str, layout: &TensorLayout) -> Result<()> {
        check_scalars(name, layout)?;
        let count = self.count();
        if usize::try_from(layout.shape[0]) != Ok(count) {
            invalid!("{name}.shape[0] = {} but num_sequences = {count}", layout.shape[0]);
        }
        Ok(())
    }

    fn queries(&self, index: usize) -> Range<usize> {
        self.cu_seqlens_q[index] as usize..self.cu_seqlens_q[index + 1] as usize
    }

    fn keys(&self, index: usize) -> Range<usize> {
        self.cu_seqlens_k[index] as usize..self.cu_seqlens_k[index + 1] as usize
    }
}

/// The runs of heads that share a method, in order.
fn head_runs(
    heads_q: usize,
    heads_kv: usize,
    method: Method,
    head_methods: Option<&[Method]>,
) -> impl Iterator<Item = (HeadSet, Method)> {
    let mut next = 0;
    core::iter::from_fn(move || {
        if next == heads_q {
            return None;
        }
        let Some(methods) = head_methods else {
            next = heads_q;
            return Some((HeadSet { query: 0..heads_q, kv: 0..heads_kv }, method));
        };
        let method = methods[next];
        let run = HeadSet::run(heads_q / heads_kv, heads_q, next, |head| methods[head] == method);
        next = run.query.end;
        Some((run, method))
    })
}

/// A call whose arguments are checked, and its parts.
pub struct Divided<'a> {
    params: Params,
    division: Division<'a>,
    layouts: Layouts<'a>,
    /// All of it as one problem.
    whole: Problem,
    /// Runs of heads that share a method.
    runs: usize,
}

/// A part of a call, which is one call of its own.
pub(crate) struct Part<'a> {
    pub(crate) section: Section,
    pub(crate) params: Params,
    pub(crate) layouts: Layouts<'a>,
    pub(crate) plan: Plan,
}

impl<'a> Divided<'a> {
    /// Checks everything but addresses and contents.
    pub fn new(params: &Params, division: &Division<'a>, layouts: &Layouts<'a>) -> Result<Self> {
        let (mut general, mut single) = (*params, *layouts);
        if let Some(sequences) = &division.sequences {
            sequences.check(&layouts.q, &layouts.k, layouts.block_mask.is_some())?;
            for (name, of_heads) in
                [("error", &mut single.error), ("keys_per_query", &mut single.keys_per_query)]
            {
                let Some(of_heads) = of_heads else { continue };
                sequences.check_of_heads(name, of_heads)?;
                // What is left to check of it does not depend on the sequences.
                of_heads.shape[0] = 1;
            }
        }
        if let Some(methods) = division.head_methods {
            if usize::try_from(layouts.q.shape[1]) != Ok(methods.len()) {
                invalid!(
                    "head_methods has {} entries but q.shape[1] = {}",
                    methods.len(),
                    layouts.q.shape[1]
                );
            }
            let refuses = |method: &Method| matches!(method, Method::Paper | Method::Refined);
            if let Some(head) = methods.iter().position(refuses).filter(|_| layouts.mask.is_some()) {
                let method = methods[head];
                let sentence = format_args!(
                    "tensors.mask is given, but head_methods[{head}] = {method:?} takes none; METHOD_EXACT and METHOD_AUTO do"
                );
                return Err(Error::new(ErrorKind::Unsupported, sentence));
            }
            general.method = Method::Auto;
        }
        let whole = Problem::new(&general, &single)?;
        let runs = head_runs(whole.heads_q, whole.heads_kv, params.method, division.head_methods).count();
        Ok(Divided { params: *params, division: *division, layouts: *layouts, whole, runs })
    }

    /// How many parts there are: one for all that is alike.
    pub fn count(&self) -> usize {
        let items = match &self.division.sequences {
            Some(sequences) => sequences.count(),
            None if self.runs > 1 => self.whole.batch,
            None => 1,
        };
        items * self.runs
    }

    /// Batch items or sequences that are computed one after the other; one for all batch items that are alike.
    pub(crate) fn items(&self) -> usize {
        self.count() / self.runs
    }

    /// The parts of an item.
    pub(crate) fn parts_of(&self, item: usize) -> Range<usize> {
        item * self.runs..(item + 1) * self.runs
    }

    /// All heads of the batch items or of the sequence that part `index` belongs to, as one problem.
    pub(crate) fn item_problem(&self, index: usize) -> Problem {
        self.whole.part(&self.item(index))
    }

    /// All heads of the batch items or of the sequence that part `index` belongs to.
    pub fn item(&self, index: usize) -> Section {
        let Problem { batch, heads_q, heads_kv, n_q, n_k, .. } = self.whole;
        let item = index / self.runs;
        let (batches, queries, keys) = match &self.division.sequences {
            Some(sequences) => (0..1, sequences.queries(item), sequences.keys(item)),
            None if self.runs > 1 => (item..item + 1, 0..n_q, 0..n_k),
            None => (0..batch, 0..n_q, 0..n_k),
        };
        let of_heads = if self.division.sequences.is_some() { item..item + 1 } else { batches.clone() };
        let heads = HeadSet { query: 0..heads_q, kv: 0..heads_kv };
        Section { batches, heads, queries, keys, of_heads: Some(of_heads), masked: true }
    }

    /// Where part `index` lies, and its method.
    pub fn section(&self, index: usize) -> (Section, Method) {
        let Problem { heads_q, heads_kv, .. } = self.whole;
        let mut runs = head_runs(heads_q, heads_kv, self.params.method, self.division.head_methods);
        let (heads, method) = runs.nth(index % self.runs).expect("there are as many runs as were counted");
        // A mask that the only method does not use is an error and not left out.
        let masked = self.division.head_methods.is_none() || matches!(method, Method::Auto | Method::Paper);
        (Section { heads, masked, ..self.item(index) }, method)
    }

    /// Part `index`.
    pub(crate) fn part(&self, index: usize, kernels: &Kernels) -> Part<'a> {
        let (section, method) = self.section(index);
        let params = Params { method, ..self.params };
        let layouts = self.layouts.part(&section);
        // What METHOD_AUTO takes does not depend on which other heads have it.
        let item = Section { masked: section.masked, ..self.item(index) };
        let mask = self.layouts.part(&item).block_mask;
        let run = Run::choose(&params, mask.as_ref(), &self.whole.part(&item));
        let plan = Plan::of(&params, &layouts, kernels, self.whole.part(&section), run);
        Part { section, params, layouts, plan }
    }
}
