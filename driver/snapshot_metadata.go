package driver

import (
	"context"
	"fmt"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
)

// metadataServer implements csi.SnapshotMetadataServer. The answers come from the
// tables of the images; no data is read, and the volume may be in use.
type metadataServer struct {
	csi.UnimplementedSnapshotMetadataServer
	*Driver
}

// maxRanges is how many ranges a message has at most: some 100 KiB.
const maxRanges = 4096

// GetMetadataAllocated implements csi.SnapshotMetadataServer.
func (s metadataServer) GetMetadataAllocated(req *csi.GetMetadataAllocatedRequest, stream csi.SnapshotMetadata_GetMetadataAllocatedServer) error {
	if err := checkMetadata(req, req.GetMaxResults(), required("snapshot_id", req.GetSnapshotId())); err != nil {
		return err
	}
	pool, err := s.pools.of(req.GetSnapshotId())
	if err != nil {
		return err
	}
	m := newRanges(req.GetMaxResults(), func(size int64, ranges []*csi.BlockMetadata) error {
		return stream.Send(&csi.GetMetadataAllocatedResponse{
			BlockMetadataType: csi.BlockMetadataType_VARIABLE_LENGTH, VolumeCapacityBytes: size, BlockMetadata: ranges,
		})
	})
	return m.end(pool.Changed(stream.Context(), "", req.GetSnapshotId(), req.GetStartingOffset(), m.setSize, m.add))
}

// GetMetadataDelta implements csi.SnapshotMetadataServer. Beyond what the
// specification asks for, the snapshots may be of a volume and of a clone of it.
func (s metadataServer) GetMetadataDelta(req *csi.GetMetadataDeltaRequest, stream csi.SnapshotMetadata_GetMetadataDeltaServer) error {
	if err := checkMetadata(req, req.GetMaxResults(), required("base_snapshot_id", req.GetBaseSnapshotId()),
		required("target_snapshot_id", req.GetTargetSnapshotId())); err != nil {
		return err
	}
	pool, err := s.pools.of(req.GetTargetSnapshotId())
	if err != nil {
		return err
	}
	base, err := s.pools.of(req.GetBaseSnapshotId())
	if err != nil {
		return err
	}
	if base != pool {
		if _, err := base.GetSnapshot(req.GetBaseSnapshotId()); err != nil {
			return err
		}
		return fmt.Errorf("%w: base_snapshot_id %s and target_snapshot_id %s are in different pools", errInvalid, req.GetBaseSnapshotId(), req.GetTargetSnapshotId())
	}
	m := newRanges(req.GetMaxResults(), func(size int64, ranges []*csi.BlockMetadata) error {
		return stream.Send(&csi.GetMetadataDeltaResponse{
			BlockMetadataType: csi.BlockMetadataType_VARIABLE_LENGTH, VolumeCapacityBytes: size, BlockMetadata: ranges,
		})
	})
	return m.end(pool.Changed(stream.Context(), req.GetBaseSnapshotId(), req.GetTargetSnapshotId(), req.GetStartingOffset(), m.setSize, m.add))
}

// checkMetadata refuses what both requests must not have.
func checkMetadata(req proto.Message, maxResults int32, errs ...error) error {
	if maxResults < 0 {
		errs = append(errs, fmt.Errorf("%w: max_results %d is negative", errInvalid, maxResults))
	}
	return firstOf(append(errs, checkMessage(req.ProtoReflect()))...)
}

// ranges gathers ranges into messages of a stream.
type ranges struct {
	size    int64
	limit   int
	waiting []*csi.BlockMetadata
	sent    bool
	send    func(size int64, ranges []*csi.BlockMetadata) error
}

func newRanges(limit int32, send func(int64, []*csi.BlockMetadata) error) *ranges {
	r := &ranges{limit: maxRanges, send: send}
	if limit > 0 {
		r.limit = min(r.limit, int(limit))
	}
	return r
}

func (r *ranges) setSize(size int64) error {
	r.size = size
	return nil
}

func (r *ranges) add(off, n int64) error {
	r.waiting = append(r.waiting, &csi.BlockMetadata{ByteOffset: off, SizeBytes: n})
	if len(r.waiting) < r.limit {
		return nil
	}
	return r.flush()
}

func (r *ranges) flush() error {
	waiting := r.waiting
	r.waiting, r.sent = nil, true // a message belongs to gRPC once it is sent
	return r.send(r.size, waiting)
}

// end sends what is left; without any range, a message that tells the size.
func (r *ranges) end(err error) error {
	if err != nil || r.sent && len(r.waiting) == 0 {
		return err
	}
	return r.flush()
}

// streamInterceptor does for streams what interceptors does for single calls.
// The request is read by the handler, which checks its limits itself.
func (d *Driver) streamInterceptor() grpc.ServerOption {
	return grpc.ChainStreamInterceptor(func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		unary := &grpc.UnaryServerInfo{Server: srv, FullMethod: info.FullMethod}
		call := func(ctx context.Context, _ any) (any, error) {
			return nil, handler(srv, streamWithContext{stream, ctx})
		}
		around := []grpc.UnaryServerInterceptor{d.metrics.count, LogCalls, makeStatus, d.calls.admit, recoverPanics}
		for i := len(around) - 1; i >= 0; i-- {
			next, interceptor := call, around[i]
			call = func(ctx context.Context, req any) (any, error) { return interceptor(ctx, req, unary, next) }
		}
		_, err := call(stream.Context(), nil)
		return err
	})
}

// streamWithContext is a stream with the context that the interceptors made.
type streamWithContext struct {
	grpc.ServerStream
	ctx context.Context
}

// Context implements grpc.ServerStream.
func (s streamWithContext) Context() context.Context { return s.ctx }
