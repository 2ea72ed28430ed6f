package router

import (
	"errors"
	"io"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// metadataServer implements csi.SnapshotMetadataServer.
type metadataServer struct {
	csi.UnimplementedSnapshotMetadataServer
	*Router
}

// GetMetadataAllocated implements csi.SnapshotMetadataServer.
func (s metadataServer) GetMetadataAllocated(req *csi.GetMetadataAllocatedRequest, to csi.SnapshotMetadata_GetMetadataAllocatedServer) error {
	g, ctx, err := s.owner(to.Context(), req.GetSnapshotId())
	if err != nil {
		return err
	}
	from, err := csi.NewSnapshotMetadataClient(g.conn).GetMetadataAllocated(ctx, req)
	return relay[csi.GetMetadataAllocatedResponse](from, to, err)
}

// GetMetadataDelta implements csi.SnapshotMetadataServer. The two snapshots are
// of one volume, or the agent says that they are not.
func (s metadataServer) GetMetadataDelta(req *csi.GetMetadataDeltaRequest, to csi.SnapshotMetadata_GetMetadataDeltaServer) error {
	g, ctx, err := s.owner(to.Context(), req.GetTargetSnapshotId())
	if err != nil {
		return err
	}
	from, err := csi.NewSnapshotMetadataClient(g.conn).GetMetadataDelta(ctx, req)
	return relay[csi.GetMetadataDeltaResponse](from, to, err)
}

// relay passes on a stream, one message at a time: who reads slowly slows down
// the agent.
func relay[T any](from interface{ Recv() (*T, error) }, to interface{ Send(*T) error }, err error) error {
	for err == nil {
		var message *T
		if message, err = from.Recv(); err == nil {
			err = to.Send(message)
		}
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}
