package e2e

import (
	"context"
	"fmt"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// agentSocket is where the kubelet finds the driver.
const agentSocket = "/var/lib/kubelet/plugins/" + driverName + "/csi.sock"

// dialAgent connects to the node agent as the kubelet does.
func dialAgent(t *testing.T) *grpc.ClientConn {
	t.Helper()
	return dial(t, agentSocket)
}

// dialController connects to a replica of the controller as its sidecars do.
func dialController(t *testing.T) *grpc.ClientConn {
	t.Helper()
	var socket string
	eventually(t, "a replica of the controller", func(ctx context.Context) error {
		pods, err := client.CoreV1().Pods(driverNamespace).List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=controller"})
		if err != nil {
			return err
		}
		for _, p := range pods.Items {
			if p.DeletionTimestamp == nil && podReady(&p) {
				socket = fmt.Sprintf("/var/lib/kubelet/pods/%s/volumes/kubernetes.io~empty-dir/socket/csi.sock", p.UID)
				return nil
			}
		}
		return fmt.Errorf("none of %d is ready", len(pods.Items))
	})
	return dial(t, socket)
}

func dial(t *testing.T, socket string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}
