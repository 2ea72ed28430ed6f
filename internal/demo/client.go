package demo

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// callTime bounds one CSI call, as the sidecars and kubelet bound theirs.
const callTime = time.Minute

// A client is the cluster's side of CSI: the sidecars and kubelet.
type client struct {
	stage      stage
	conn       *grpc.ClientConn
	identity   csi.IdentityClient
	controller csi.ControllerClient
	node       csi.NodeClient
}

func dial(s stage) (*client, error) {
	conn, err := grpc.NewClient("unix://"+s.socket(),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		// The socket appears within milliseconds of the agent's start.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 5 * time.Millisecond, Multiplier: 1.5, MaxDelay: time.Second},
			MinConnectTimeout: callTime,
		}))
	if err != nil {
		return nil, err
	}
	return &client{s, conn, csi.NewIdentityClient(conn), csi.NewControllerClient(conn), csi.NewNodeClient(conn)}, nil
}

func (c *client) close() { c.conn.Close() }

// A volume is what the cluster knows of one.
type volume struct {
	name    string
	fs      string // "ext4" or "xfs"; "" is a raw block volume
	id      string
	bytes   int64
	context map[string]string
}

func (v *volume) capability() *csi.VolumeCapability {
	c := &csi.VolumeCapability{AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER}}
	if v.fs == "" {
		c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
	} else {
		c.AccessType = &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: v.fs}}
	}
	return c
}

// A content is where a new volume's content comes from; the zero value is an
// empty volume.
type content struct {
	snapshot string // ID
	volume   string // ID
}

func (s content) source() *csi.VolumeContentSource {
	switch {
	case s.snapshot != "":
		return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: s.snapshot}}}
	case s.volume != "":
		return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: s.volume}}}
	}
	return nil
}

// create makes a volume of bytes bytes. fs "" makes a raw block volume.
func (c *client) create(ctx context.Context, name, fs string, bytes int64, from content) (*volume, error) {
	v := &volume{name: name, fs: fs}
	request := &csi.CreateVolumeRequest{
		Name:                name,
		CapacityRange:       &csi.CapacityRange{RequiredBytes: bytes},
		VolumeCapabilities:  []*csi.VolumeCapability{v.capability()},
		VolumeContentSource: from.source(),
	}
	err := call(ctx, "CreateVolume", func(ctx context.Context) error {
		response, err := c.controller.CreateVolume(ctx, request)
		v.id, v.bytes, v.context = response.GetVolume().GetVolumeId(), response.GetVolume().GetCapacityBytes(), response.GetVolume().GetVolumeContext()
		return err
	})
	return v, err
}

func (c *client) delete(ctx context.Context, id string) error {
	return call(ctx, "DeleteVolume", func(ctx context.Context) error {
		_, err := c.controller.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id})
		return err
	})
}

// snapshot returns the ID of a new snapshot that is ready to use.
func (c *client) snapshot(ctx context.Context, name string, of *volume) (id string, err error) {
	err = call(ctx, "CreateSnapshot", func(ctx context.Context) error {
		response, err := c.controller.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: of.id})
		if err == nil && !response.GetSnapshot().GetReadyToUse() {
			return status.Error(codes.Aborted, "the snapshot is not ready to use")
		}
		id = response.GetSnapshot().GetSnapshotId()
		return err
	})
	return id, err
}

func (c *client) deleteSnapshot(ctx context.Context, id string) error {
	return call(ctx, "DeleteSnapshot", func(ctx context.Context) error {
		_, err := c.controller.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: id})
		return err
	})
}

// mount stages and publishes v and returns where it is then.
func (c *client) mount(ctx context.Context, v *volume) (target string, err error) {
	staging, target := c.stage.staging(v.id), c.stage.target(v.id)
	if err := os.MkdirAll(staging, 0o700); err != nil {
		return "", err
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o700); err != nil {
		return "", err
	}
	err = call(ctx, "NodeStageVolume", func(ctx context.Context) error {
		_, err := c.node.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{
			VolumeId: v.id, StagingTargetPath: staging, VolumeCapability: v.capability(), VolumeContext: v.context,
		})
		return err
	})
	if err != nil {
		return "", err
	}
	return target, call(ctx, "NodePublishVolume", func(ctx context.Context) error {
		_, err := c.node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
			VolumeId: v.id, StagingTargetPath: staging, TargetPath: target, VolumeCapability: v.capability(), VolumeContext: v.context,
		})
		return err
	})
}

// unmount undoes mount, whatever part of it was done.
func (c *client) unmount(ctx context.Context, id string) error {
	err := call(ctx, "NodeUnpublishVolume", func(ctx context.Context) error {
		_, err := c.node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: c.stage.target(id)})
		return err
	})
	if err != nil {
		return err
	}
	err = call(ctx, "NodeUnstageVolume", func(ctx context.Context) error {
		_, err := c.node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: c.stage.staging(id)})
		return err
	})
	if err != nil {
		return err
	}
	// kubelet removes both directories; one that is still a mount point stays.
	os.Remove(filepath.Dir(c.stage.target(id)))
	os.Remove(c.stage.staging(id))
	return nil
}

// expand grows v to bytes bytes while it is published. Without itsFilesystem
// it leaves that for the next mount.
func (c *client) expand(ctx context.Context, v *volume, bytes int64, itsFilesystem bool) error {
	var needNode bool
	size := &csi.CapacityRange{RequiredBytes: bytes}
	err := call(ctx, "ControllerExpandVolume", func(ctx context.Context) error {
		response, err := c.controller.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{
			VolumeId: v.id, CapacityRange: size, VolumeCapability: v.capability(),
		})
		v.bytes, needNode = response.GetCapacityBytes(), response.GetNodeExpansionRequired()
		return err
	})
	if err != nil || !needNode || !itsFilesystem {
		return err
	}
	return call(ctx, "NodeExpandVolume", func(ctx context.Context) error {
		_, err := c.node.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{
			VolumeId: v.id, VolumePath: c.stage.target(v.id), StagingTargetPath: c.stage.staging(v.id),
			CapacityRange: size, VolumeCapability: v.capability(),
		})
		return err
	})
}

// stats returns what the node agent says of v's usage by unit.
func (c *client) stats(ctx context.Context, v *volume) (map[csi.VolumeUsage_Unit]*csi.VolumeUsage, error) {
	usage := map[csi.VolumeUsage_Unit]*csi.VolumeUsage{}
	err := call(ctx, "NodeGetVolumeStats", func(ctx context.Context) error {
		response, err := c.node.NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{
			VolumeId: v.id, VolumePath: c.stage.target(v.id), StagingTargetPath: c.stage.staging(v.id),
		})
		for _, u := range response.GetUsage() {
			usage[u.GetUnit()] = u
		}
		return err
	})
	return usage, err
}

// listed returns how many volumes and snapshots the driver lists.
func (c *client) listed(ctx context.Context) (volumes, snapshots int, err error) {
	err = call(ctx, "ListVolumes", func(ctx context.Context) error {
		response, err := c.controller.ListVolumes(ctx, &csi.ListVolumesRequest{})
		volumes = len(response.GetEntries())
		return err
	})
	if err != nil {
		return 0, 0, err
	}
	err = call(ctx, "ListSnapshots", func(ctx context.Context) error {
		response, err := c.controller.ListSnapshots(ctx, &csi.ListSnapshotsRequest{})
		snapshots = len(response.GetEntries())
		return err
	})
	return volumes, snapshots, err
}

// call runs one CSI call and repeats it while the answer is "not final", as
// the cluster's callers do: work that goes on, or another operation on the
// same volume.
func call(ctx context.Context, name string, do func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	for {
		err := do(ctx)
		if status.Code(err) != codes.Aborted {
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", name, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}
