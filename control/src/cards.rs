//! Republishing: which model cards of a target endpoint we publish under our own endpoint.
//!
//! A frontend lists a model while an instance and a card with the same id exist (§4.4 of
//! `spec/events-discovery.md`). A router in between offers one instance, and therefore one card
//! per suffix: the base card and one per adapter. The card's content is never touched; the
//! files that it points to are fetched from the workers themselves.
//!
//! ```text
//! cards of the target, ids of its instances, what is published --plan--> steps, conflicts
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use corelane_codec::control_message::PayloadCodec;
use corelane_codec::discovery::ModelRecord;
use corelane_codec::path::{EndpointId, MODELS_BUCKET};
use serde::Deserialize;

use crate::discovery::{Discovery, DiscoveryError, Record, Watch};
use crate::watch::Instance;

/// The payload codec that our own instance record asks for. Payloads pass through unparsed, so
/// that all workers behind us must read what clients send us: MessagePack only if every one
/// asks for it. While none is known it is MessagePack, because Dynamo's workers decode by the
/// codec that the request itself names.
pub fn advertised_codec(instances: &[Instance]) -> PayloadCodec {
    let all = instances
        .iter()
        .all(|instance| instance.codec == PayloadCodec::MessagePack);
    if all {
        PayloadCodec::MessagePack
    } else {
        PayloadCodec::Json
    }
}

/// A model card and what we need to know of its content.
#[derive(Debug)]
pub struct Card {
    /// As stored.
    pub record: ModelRecord,
    facts: Facts,
}

/// The fields that decide whether two cards can stand side by side.
#[derive(Debug, Deserialize)]
struct Facts {
    display_name: String,
    #[serde(default)]
    source_path: Option<String>,
    #[serde(default)]
    aliases: Option<Vec<String>>,
    #[serde(default)]
    lora: Option<serde::de::IgnoredAny>,
}

impl Card {
    /// Reads a stored value.
    ///
    /// # Errors
    /// When it is not a model record, or its card has no `display_name`.
    pub fn parse(value: &[u8]) -> Result<Self, serde_json::Error> {
        let mut record: ModelRecord = serde_json::from_slice(value)?;
        record.model_suffix = record.model_suffix.filter(|suffix| !suffix.is_empty());
        let facts = serde_json::from_str(record.card_json.get())?;
        Ok(Self { record, facts })
    }

    /// The name that clients ask for.
    pub fn display_name(&self) -> &str {
        &self.facts.display_name
    }

    /// Empty for a base model.
    fn suffix(&self) -> &str {
        self.record.model_suffix.as_deref().unwrap_or("")
    }

    fn is_adapter(&self) -> bool {
        self.record.model_suffix.is_some() || self.facts.lora.is_some()
    }

    fn base_identity(&self) -> &str {
        let path = self
            .facts
            .source_path
            .as_deref()
            .filter(|path| !path.is_empty());
        path.unwrap_or(&self.facts.display_name)
    }

    fn same_bytes(&self, other: &Card) -> bool {
        self.record.card_json.get() == other.record.card_json.get()
    }

    /// Two cards that may be published as one: the same model from two instances.
    fn same_model(&self, other: &Card) -> bool {
        self.facts.display_name == other.facts.display_name
            && self.is_adapter() == other.is_adapter()
            && (!self.is_adapter() || self.base_identity() == other.base_identity())
    }

    /// Two cards that may stand under one instance (the conflict rule of §4.4).
    fn stands_beside(&self, other: &Card) -> bool {
        let (base, adapter) = match (self.is_adapter(), other.is_adapter()) {
            (true, true) => return self.base_identity() == other.base_identity(),
            (false, true) => (self, other),
            (true, false) => (other, self),
            // One instance has one base card.
            (false, false) => return false,
        };
        let taken = |aliases: &Vec<String>| aliases.contains(&adapter.facts.display_name);
        base.base_identity() == adapter.base_identity()
            && base.facts.display_name != adapter.facts.display_name
            && !base.facts.aliases.as_ref().is_some_and(taken)
    }
}

/// What is published, by suffix; the base card has the empty one.
pub type Published = BTreeMap<String, Rc<Card>>;

/// What to do about one suffix.
#[derive(Debug)]
pub enum Step {
    /// Nobody carries it any more.
    Remove,
    /// Store this content; over the old one where there is one.
    Put(Rc<Card>),
    /// Another model takes the place: delete first, because readers refuse to turn one model
    /// into another in place (§4.4, immutability).
    Recreate(Rc<Card>),
}

/// A card that is not published, because another one holds its place.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Conflict {
    /// The instance that carries the card.
    pub instance_id: u64,
    /// The card's suffix, empty for a base card.
    pub suffix: String,
    /// The card's name.
    pub display_name: String,
}

/// What must change.
#[derive(Debug, Default)]
pub struct Plan {
    /// By suffix; what is not named stays.
    pub steps: BTreeMap<String, Step>,
    /// In order of suffix, then instance.
    pub conflicts: Vec<Conflict>,
}

/// Compares what the target carries with what is published.
///
/// For each suffix: content that a living instance still carries byte for byte stays. When its
/// carriers are gone, the same model from another instance replaces it in place (frontends that
/// loaded the old one keep it, later ones get paths that exist). Only then another model.
pub fn plan(cards: &[Rc<Card>], live: &BTreeSet<u64>, published: &Published) -> Plan {
    let mut carried: BTreeMap<&str, Vec<&Rc<Card>>> = BTreeMap::new();
    for card in cards
        .iter()
        .filter(|card| live.contains(&card.record.instance_id))
    {
        carried.entry(card.suffix()).or_default().push(card);
    }
    let mut plan = Plan::default();
    let mut chosen: Published = BTreeMap::new();
    // What stands has the first say; then the base card; then adapters by name.
    let mut order: Vec<&str> = carried.keys().copied().collect();
    order.sort_by_key(|suffix| (!published.contains_key(*suffix), *suffix));
    for suffix in order {
        let Some(group) = carried.get_mut(suffix) else {
            continue;
        };
        group.sort_by_key(|card| card.record.instance_id);
        let fits = |card: &Card| chosen.values().all(|other| card.stands_beside(other));
        let choice = choose(group, published.get(suffix), fits);
        let stays = |card: &Card| {
            choice
                .as_ref()
                .is_some_and(|choice| choice.same_model(card))
        };
        plan.conflicts.extend(
            group
                .iter()
                .filter(|card| !stays(card))
                .map(|card| Conflict {
                    instance_id: card.record.instance_id,
                    suffix: suffix.to_owned(),
                    display_name: card.display_name().to_owned(),
                }),
        );
        if let Some(card) = choice {
            chosen.insert(suffix.to_owned(), card);
        }
    }
    plan.conflicts
        .sort_by(|a, b| (&a.suffix, a.instance_id).cmp(&(&b.suffix, b.instance_id)));
    plan.steps = steps(&chosen, published);
    plan
}

fn choose(
    group: &[&Rc<Card>],
    standing: Option<&Rc<Card>>,
    fits: impl Fn(&Card) -> bool,
) -> Option<Rc<Card>> {
    let fitting = || group.iter().copied().filter(|card| fits(card));
    let kept = standing.and_then(|standing| {
        fitting()
            .find(|card| card.same_bytes(standing))
            .or_else(|| fitting().find(|card| card.same_model(standing)))
    });
    kept.or_else(|| fitting().next()).cloned()
}

fn steps(chosen: &Published, published: &Published) -> BTreeMap<String, Step> {
    let mut steps = BTreeMap::new();
    for suffix in published
        .keys()
        .filter(|suffix| !chosen.contains_key(*suffix))
    {
        steps.insert(suffix.clone(), Step::Remove);
    }
    for (suffix, card) in chosen {
        let step = match published.get(suffix) {
            Some(standing) if standing.same_bytes(card) => continue,
            Some(standing) if !standing.same_model(card) => Step::Recreate(card.clone()),
            _ => Step::Put(card.clone()),
        };
        steps.insert(suffix.clone(), step);
    }
    steps
}

/// A watch on the model cards of one endpoint.
pub struct CardWatch {
    watch: Watch<Card>,
    target: EndpointId,
}

impl CardWatch {
    /// Starts watching the cards of `target`.
    pub fn new(discovery: &Discovery, target: &EndpointId) -> Self {
        let watch = discovery.watch(&format!("{MODELS_BUCKET}/{target}/"), |_, value| {
            Card::parse(value)
        });
        Self {
            watch,
            target: target.clone(),
        }
    }

    /// Waits until something changed since the last call; the first call returns at once.
    pub async fn changed(&mut self) {
        self.watch.changed().await;
    }

    /// Whether the store has listed them: before that there may be more than is known.
    pub fn are_listed(&self) -> bool {
        self.watch.directory().listed()
    }

    /// The cards of the target. Those of an endpoint whose name continues the target's with a
    /// `/` lie under the same prefix and are left out; the value tells them apart.
    pub fn cards(&self) -> Vec<Rc<Card>> {
        let directory = self.watch.directory();
        let all = directory.entries().map(|(_, card, _)| card);
        all.filter(|card| card.record.key().endpoint == self.target)
            .cloned()
            .collect()
    }
}

/// Keeps the cards under our own endpoint in step with those of the target.
pub struct CardPublisher {
    discovery: Discovery,
    listen: EndpointId,
    published: Published,
    conflicts: BTreeSet<Conflict>,
}

impl CardPublisher {
    /// Publishes nothing yet.
    pub fn new(discovery: &Discovery, listen: &EndpointId) -> Self {
        let (discovery, listen) = (discovery.clone(), listen.clone());
        Self {
            discovery,
            listen,
            published: BTreeMap::new(),
            conflicts: BTreeSet::new(),
        }
    }

    /// Does what [`plan`] says. Call it when the cards or the instances of the target changed;
    /// a change of our identity needs no call.
    pub async fn reconcile(&mut self, cards: &[Rc<Card>], instances: &[Instance]) {
        let live = instances.iter().map(|instance| instance.id).collect();
        let plan = plan(cards, &live, &self.published);
        self.report(plan.conflicts);
        for (suffix, step) in plan.steps {
            let done = match step {
                Step::Remove => self.remove(&suffix).await,
                Step::Put(card) => self.put(&suffix, card).await,
                Step::Recreate(card) => {
                    let removed = self.remove(&suffix).await;
                    removed.and(self.put(&suffix, card).await)
                }
            };
            if let Err(error) = done {
                tracing::error!(listen = %self.listen, suffix, %error, "model card not published");
            }
        }
    }

    /// The cards that stand now, by suffix.
    pub fn published(&self) -> &Published {
        &self.published
    }

    async fn remove(&mut self, suffix: &str) -> Result<(), DiscoveryError> {
        let name = Record::card_name(&self.listen, non_empty(suffix));
        self.discovery.unregister(&name).await;
        if let Some(card) = self.published.remove(suffix) {
            let model = card.display_name();
            tracing::info!(listen = %self.listen, model, "model card withdrawn");
        }
        Ok(())
    }

    /// A refused card counts as published, or it would be tried again at every change.
    async fn put(&mut self, suffix: &str, card: Rc<Card>) -> Result<(), DiscoveryError> {
        let record = Record::card(&self.listen, non_empty(suffix), &card.record.card_json);
        tracing::info!(listen = %self.listen, model = card.display_name(), "model card published");
        self.published.insert(suffix.to_owned(), card);
        self.discovery.replace(record).await.map(|_| ())
    }

    /// Each conflict is said and counted when it begins.
    fn report(&mut self, conflicts: Vec<Conflict>) {
        let conflicts: BTreeSet<Conflict> = conflicts.into_iter().collect();
        let stats = self.discovery.stats();
        for conflict in conflicts.difference(&self.conflicts) {
            stats.add(&stats.card_conflicts, 1);
            let Conflict {
                instance_id,
                suffix,
                display_name,
            } = conflict;
            let instance = format_args!("{instance_id:x}");
            tracing::warn!(
                listen = %self.listen, instance, suffix, model = display_name,
                "model card conflicts with a published one and is left out"
            );
        }
        self.conflicts = conflicts;
    }
}

fn non_empty(suffix: &str) -> Option<&str> {
    Some(suffix).filter(|suffix| !suffix.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discovery::{MemoryDiscovery, MemoryStore};

    fn card(id: u64, suffix: &str, content: &str) -> Rc<Card> {
        let names = r#""namespace":"d","component":"b","endpoint":"g""#;
        let text = format!(r#"{{"type":"Model",{names},"instance_id":{id},"card_json":{content},"#)
            + &format!(r#""model_suffix":"{suffix}"}}"#);
        Rc::new(Card::parse(text.as_bytes()).unwrap())
    }

    fn base(id: u64, model: &str, extra: &str) -> Rc<Card> {
        card(
            id,
            "",
            &format!(r#"{{"display_name":"{model}","source_path":"/m"{extra}}}"#),
        )
    }

    fn adapter(id: u64, name: &str, source: &str) -> Rc<Card> {
        let content =
            format!(r#"{{"display_name":"{name}","source_path":"{source}","lora":{{}}}}"#);
        card(id, name, &content)
    }

    /// Applies a plan's steps to what is published.
    fn apply(plan: &Plan, published: &mut Published) {
        for (suffix, step) in &plan.steps {
            match step {
                Step::Remove => published.remove(suffix),
                Step::Put(card) | Step::Recreate(card) => {
                    published.insert(suffix.clone(), card.clone())
                }
            };
        }
    }

    fn live(ids: &[u64]) -> BTreeSet<u64> {
        ids.iter().copied().collect()
    }

    #[test]
    fn one_model_from_many_instances_is_one_card() {
        let cards = [
            base(2, "m", ""),
            base(1, "m", r#","x":1"#),
            base(3, "m", ""),
        ];
        let first = plan(&cards, &live(&[2, 3]), &Published::new());
        assert!(matches!(&first.steps[""], Step::Put(card) if card.record.instance_id == 2));
        assert!(first.conflicts.is_empty());
        let mut published = Published::new();
        apply(&first, &mut published);
        // A smaller id comes: what stands stays.
        assert!(plan(&cards, &live(&[1, 2, 3]), &published).steps.is_empty());
        // Its own carrier goes, an equal card lives: nothing to do.
        assert!(plan(&cards, &live(&[1, 3]), &published).steps.is_empty());
        // Only other content of the same model is left: replaced in place.
        let other = plan(&cards, &live(&[1]), &published);
        assert!(matches!(&other.steps[""], Step::Put(card) if card.record.instance_id == 1));
        // Cards without an instance do not count.
        assert!(matches!(
            plan(&cards, &live(&[9]), &published).steps[""],
            Step::Remove
        ));
    }

    #[test]
    fn another_base_model_is_a_conflict_until_the_first_is_gone() {
        let cards = [base(5, "old", ""), base(1, "new", "")];
        let published = Published::from([(String::new(), cards[0].clone())]);
        let both = plan(&cards, &live(&[1, 5]), &published);
        assert!(both.steps.is_empty());
        let conflict = Conflict {
            instance_id: 1,
            suffix: "".into(),
            display_name: "new".into(),
        };
        assert_eq!(both.conflicts, [conflict]);
        let after = plan(&cards, &live(&[1]), &published);
        assert!(matches!(&after.steps[""], Step::Recreate(card) if card.display_name() == "new"));
        assert!(after.conflicts.is_empty());
    }

    #[test]
    fn adapters_stand_beside_their_own_base_only() {
        let aliases = r#","aliases":["taken"]"#;
        let cards = [
            base(1, "m", aliases),
            adapter(1, "lora-1", "/m"),
            adapter(2, "lora-2", "/m"),
            adapter(2, "alien", "/other"),
            adapter(2, "taken", "/m"),
            adapter(2, "m", "/m"),
        ];
        let plan = plan(&cards, &live(&[1, 2]), &Published::new());
        let suffixes: Vec<&str> = plan.steps.keys().map(String::as_str).collect();
        assert_eq!(suffixes, ["", "lora-1", "lora-2"]);
        let left_out: Vec<&str> = plan
            .conflicts
            .iter()
            .map(|conflict| conflict.suffix.as_str())
            .collect();
        assert_eq!(left_out, ["alien", "m", "taken"]);
    }

    #[test]
    fn codec_is_msgpack_only_if_all_ask_for_it() {
        let instance = |codec| Instance {
            device: None,
            id: 1,
            address: "127.0.0.1:1".parse().unwrap(),
            path: b"x".to_vec(),
            codec,
        };
        let (json, msgpack) = (
            instance(PayloadCodec::Json),
            instance(PayloadCodec::MessagePack),
        );
        assert_eq!(advertised_codec(&[]), PayloadCodec::MessagePack);
        assert_eq!(
            advertised_codec(std::slice::from_ref(&msgpack)),
            PayloadCodec::MessagePack
        );
        assert_eq!(advertised_codec(&[msgpack, json]), PayloadCodec::Json);
    }

    #[test]
    fn a_card_without_a_name_is_no_card() {
        let names = r#""namespace":"d","component":"b","endpoint":"g","instance_id":1"#;
        let text = format!(r#"{{"type":"Model",{names},"card_json":{{}}}}"#);
        assert!(Card::parse(text.as_bytes()).is_err());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn the_driver_publishes_under_our_own_identity() {
        let store = MemoryStore::default();
        let discovery = Discovery::Memory(MemoryDiscovery::new(&store));
        let listen = EndpointId::new("front", "router", "generate");
        let seen = CardWatch::new(&discovery, &listen);
        let mut publisher = CardPublisher::new(&discovery, &listen);
        let instance = Instance {
            id: 1,
            address: "127.0.0.1:1".parse().unwrap(),
            path: b"x".to_vec(),
            codec: PayloadCodec::Json,
            device: None,
        };
        let cards = [
            base(1, "m", ""),
            adapter(1, "lora-1", "/m"),
            base(1, "n", ""),
        ];
        publisher
            .reconcile(&cards, std::slice::from_ref(&instance))
            .await;
        let found = seen.cards();
        assert_eq!(found.len(), 2);
        for card in &found {
            assert_eq!(card.record.instance_id, discovery.instance_id());
        }
        assert_eq!(
            found[0].record.card_json.get(),
            cards[0].record.card_json.get()
        );
        assert_eq!(discovery.stats().card_conflicts.get(), 1);
        publisher.reconcile(&cards, &[]).await;
        assert!(seen.cards().is_empty() && publisher.published().is_empty());
    }
}
