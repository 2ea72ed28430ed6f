package driver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
	"k8s.io/klog/v2"

	"csi-qcow2/volume"
)

// The operator's service stands beside CSI on the node agent's socket, for what
// CSI has no words for. Requests and replies are JSON in a
// google.protobuf.BytesValue: both ends are this program.
//
//	Report   {"usage": bool}                        what is in the pools of the node
//	Revert   {"volume": ID, "snapshot": ID}         brings a volume back to a snapshot
const operatorService = "csi_qcow2.v1.Operator"

type reportRequest struct {
	Usage bool `json:"usage,omitempty"`
}

type revertRequest struct {
	Volume   string `json:"volume"`
	Snapshot string `json:"snapshot"`
}

// registerOperator adds the operator's service to s.
func (d *Driver) registerOperator(s *grpc.Server) {
	s.RegisterService(&grpc.ServiceDesc{
		ServiceName: operatorService,
		HandlerType: (*any)(nil),
		Methods:     []grpc.MethodDesc{operatorMethod("Report", (*Driver).report), operatorMethod("Revert", (*Driver).revert)},
	}, d)
}

// operatorMethod makes an RPC of fn, which passes the interceptors as those of CSI do.
func operatorMethod[In, Out any](name string, fn func(d *Driver, ctx context.Context, in In) (Out, error)) grpc.MethodDesc {
	handler := func(srv any, ctx context.Context, decode func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
		req := new(wrapperspb.BytesValue)
		if err := decode(req); err != nil {
			return nil, err
		}
		handle := func(ctx context.Context, _ any) (any, error) {
			var in In
			if err := json.Unmarshal(req.GetValue(), &in); err != nil {
				return nil, fmt.Errorf("%w: request: %w", errInvalid, err)
			}
			out, err := fn(srv.(*Driver), ctx, in)
			if err != nil {
				return nil, err
			}
			b, err := json.Marshal(out)
			return wrapperspb.Bytes(b), err
		}
		if interceptor == nil {
			return handle(ctx, req)
		}
		return interceptor(ctx, req, &grpc.UnaryServerInfo{Server: srv, FullMethod: operatorMethodName(name)}, handle)
	}
	return grpc.MethodDesc{MethodName: name, Handler: handler}
}

func operatorMethodName(name string) string { return "/" + operatorService + "/" + name }

func (d *Driver) report(ctx context.Context, req reportRequest) ([]volume.Report, error) {
	var all []volume.Report
	for _, pool := range d.pools.all() {
		r, err := pool.Report(ctx, req.Usage)
		if err != nil {
			return nil, err
		}
		all = append(all, r)
	}
	return all, nil
}

func (d *Driver) revert(ctx context.Context, req revertRequest) (struct{}, error) {
	return change(ctx, d, req.Volume, func(ctx context.Context) (none struct{}, err error) {
		pool, err := d.pools.of(req.Volume)
		if err != nil {
			return none, err
		}
		if v := d.stagedVolume(req.Volume); v != nil {
			return none, fmt.Errorf("%w: volume %s is staged at %q; stop the pods that use it first", errPrecondition, req.Volume, v.hint.StagingPath)
		}
		if _, err := pool.Revert(ctx, req.Volume, req.Snapshot); err != nil {
			return none, err
		}
		klog.FromContext(ctx).V(2).Info("reverted", "volumeID", req.Volume, "snapshotID", req.Snapshot)
		return none, nil
	})
}

// An Operator asks a node agent for what CSI has no words for.
type Operator struct{ conn *grpc.ClientConn }

// ErrNoAgent: nobody serves at an endpoint.
var ErrNoAgent = errors.New("no node agent serves")

// maxReport bounds what a node agent may answer, in bytes: tens of thousands of volumes.
const maxReport = 256 << 20

// DialOperator connects to the node agent at endpoint. Errors: ErrNoAgent.
func DialOperator(ctx context.Context, endpoint string) (*Operator, error) {
	path, err := ParseEndpoint(endpoint)
	if err != nil {
		return nil, err
	}
	dial := func(ctx context.Context, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}
	probe, err := dial(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("%w at %q: %w", ErrNoAgent, endpoint, err)
	}
	probe.Close()
	conn, err := grpc.NewClient("passthrough:///"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(dial), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxReport)))
	if err != nil {
		return nil, err
	}
	return &Operator{conn}, nil
}

// Close ends the connection.
func (o *Operator) Close() error { return o.conn.Close() }

// call calls the method name.
func (o *Operator) call(ctx context.Context, name string, in, out any) error {
	b, err := json.Marshal(in)
	if err != nil {
		return err
	}
	reply := new(wrapperspb.BytesValue)
	if err := o.conn.Invoke(ctx, operatorMethodName(name), wrapperspb.Bytes(b), reply); err != nil {
		return fmt.Errorf("node agent: %s", status.Convert(err).Message())
	}
	return json.Unmarshal(reply.GetValue(), out)
}

// Report describes the pools of the node; see volume.Pool.Report.
func (o *Operator) Report(ctx context.Context, usage bool) ([]volume.Report, error) {
	var all []volume.Report
	err := o.call(ctx, "Report", reportRequest{usage}, &all)
	return all, err
}

// Revert brings the volume id back to a snapshot; see volume.Pool.Revert.
func (o *Operator) Revert(ctx context.Context, id, snapshot string) error {
	return o.call(ctx, "Revert", revertRequest{id, snapshot}, new(struct{}))
}
