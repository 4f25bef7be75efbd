//! Discovery as the options ask for it.

use std::rc::Rc;

use anyhow::Result;

use super::options::Options;
use super::paths::Paths;
use crate::config::Backend;
use crate::discovery::{
    BeforeRegister, Discovery, EtcdDiscovery, EtcdOptions, FileDiscovery, FileOptions,
    MemoryDiscovery,
};

/// Opens it. Whoever finds us under a new identity can be served under it already.
pub(super) async fn discovery(options: &Options, paths: &Rc<Paths>) -> Result<Discovery> {
    let lookup = |name: &str| options.discovery.variable(name);
    let discovery = match options.discovery.backend {
        Backend::Memory => {
            let store = options.memory.clone().unwrap_or_default();
            Discovery::Memory(MemoryDiscovery::new(&store))
        }
        Backend::File => Discovery::File(FileDiscovery::open(FileOptions::from_env(lookup)).await?),
        Backend::Etcd => {
            let mut settings = EtcdOptions::from_env(lookup)?;
            let paths = Rc::clone(paths);
            let hook: BeforeRegister = Rc::new(move |id| {
                let paths = Rc::clone(&paths);
                Box::pin(async move { paths.be(id).await })
            });
            settings.before_register = Some(hook);
            tracing::info!(
                endpoints = settings.endpoints.join(","),
                "connecting to etcd"
            );
            Discovery::Etcd(EtcdDiscovery::connect(settings).await?)
        }
    };
    Ok(discovery)
}
