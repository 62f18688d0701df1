package broker

import (
	"testing"

	"github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// FuzzReference reads what a broker may send for a reference.
func FuzzReference(f *testing.F) {
	for _, m := range []proto.Message{
		&broker.WorkloadPIDReference{Pid: 1}, &broker.WorkloadPIDReference{Pid: -1},
		&broker.KubernetesObjectReference{Type: &broker.KubernetesObjectType{Plural: "pods", Group: "core"}, Uid: "x"},
	} {
		reference, err := anypb.New(m)
		if err != nil {
			f.Fatal(err)
		}
		wire, err := proto.Marshal(&broker.WorkloadReference{Reference: reference})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(wire)
	}
	f.Fuzz(func(t *testing.T, wire []byte) {
		var r broker.WorkloadReference
		if proto.Unmarshal(wire, &r) != nil {
			return // gRPC refuses it
		}
		pid, err := pidOf(&r)
		if err == nil && pid <= 0 {
			t.Errorf("pid %d was taken", pid)
		}
		if err != nil && status.Code(err) != codes.InvalidArgument {
			t.Errorf("error is %v", err)
		}
		if s := status.Convert(err); len(s.Message()) > 1000 || err != nil && len(s.Details()) != 1 {
			t.Errorf("the error is of %d bytes, with %d details", len(s.Message()), len(s.Details()))
		}
	})
}
