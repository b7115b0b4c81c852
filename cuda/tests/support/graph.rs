//! Captured calls.

use cudarc::driver::sys;

use super::device::{Stream, cuda};

/// A captured call, to be launched.
pub struct Graph(sys::CUgraphExec);

impl Graph {
    /// What `body` enqueues on `stream`: kernels and fills, nothing else.
    pub fn capture(stream: &Stream, body: impl FnOnce()) -> Self {
        const GLOBAL: sys::CUstreamCaptureMode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
        cuda!(cuStreamBeginCapture_v2(stream.handle(), GLOBAL));
        body();
        let mut graph: sys::CUgraph = std::ptr::null_mut();
        cuda!(cuStreamEndCapture(stream.handle(), &mut graph));
        let mut count = 0;
        cuda!(cuGraphGetNodes(graph, std::ptr::null_mut(), &mut count));
        let mut nodes = vec![std::ptr::null_mut(); count];
        cuda!(cuGraphGetNodes(graph, nodes.as_mut_ptr(), &mut count));
        for &node in &nodes {
            let mut kind = sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY;
            cuda!(cuGraphNodeGetType(node, &mut kind));
            assert!(
                matches!(
                    kind,
                    sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL
                        | sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEMSET
                ),
                "a call with a workspace enqueues kernels and fills only, not {kind:?}"
            );
        }
        let mut executable: sys::CUgraphExec = std::ptr::null_mut();
        cuda!(cuGraphInstantiateWithFlags(&mut executable, graph, 0));
        cuda!(cuGraphDestroy(graph));
        Graph(executable)
    }

    /// Runs it to its end.
    pub fn launch(&self, stream: &Stream) {
        cuda!(cuGraphLaunch(self.0, stream.handle()));
        stream.synchronize();
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        cuda!(cuGraphExecDestroy(self.0));
    }
}
