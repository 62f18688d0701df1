// Plugin is an example of plugins that are written for SPIRE, with its SDK
// alone. The first argument says which one it is: agent, server or workload.
// Its configuration may name a mode, in which it misbehaves, for tests:
// mode = "hang".
package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spiffe/spire-plugin-sdk/pluginmain"
	"github.com/spiffe/spire-plugin-sdk/pluginsdk"
	agentstorev1 "github.com/spiffe/spire-plugin-sdk/proto/spire/hostservice/server/agentstore/v1"
	agentv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/nodeattestor/v1"
	workloadv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/workloadattestor/v1"
	serverv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/nodeattestor/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func main() {
	what := ""
	if len(os.Args) > 1 {
		what = os.Args[1]
	}
	c := &configured{}
	switch what {
	case "agent":
		pluginmain.Serve(agentv1.NodeAttestorPluginServer(&agent{configured: c}), configv1.ConfigServiceServer(c))
	case "server":
		pluginmain.Serve(serverv1.NodeAttestorPluginServer(&server{configured: c}), configv1.ConfigServiceServer(c))
	case "workload":
		pluginmain.Serve(workloadv1.WorkloadAttestorPluginServer(&workload{configured: c}), configv1.ConfigServiceServer(c))
	case "says": // it is none: for tests of what may come in place of a plugin's first line
		fmt.Println(strings.ReplaceAll(strings.Join(os.Args[2:], " "), "TMPDIR", os.TempDir()))
		time.Sleep(time.Hour)
	case "mute":
		time.Sleep(time.Hour)
	default:
		fmt.Fprintln(os.Stderr, "usage: plugin agent|server|workload")
		os.Exit(2)
	}
}

type settings struct{ trustDomain, mode, file string }

type configured struct {
	configv1.UnimplementedConfigServer
	now atomic.Pointer[settings]
}

var setting = regexp.MustCompile(`(?m)^\s*(mode|file)\s*=\s*"([^"]*)"\s*$`)

// Configure takes what SPIRE gives it.
func (c *configured) Configure(_ context.Context, req *configv1.ConfigureRequest) (*configv1.ConfigureResponse, error) {
	s := &settings{trustDomain: req.CoreConfiguration.GetTrustDomain()}
	for _, m := range setting.FindAllStringSubmatch(req.HclConfiguration, -1) {
		if m[1] == "mode" {
			s.mode = m[2]
		} else {
			s.file = m[2]
		}
	}
	if s.mode == "refuse" {
		return nil, status.Error(codes.InvalidArgument, "no such mode")
	}
	c.now.Store(s)
	return &configv1.ConfigureResponse{}, nil
}

// misbehave does what a mode says. A file, if one is named, makes it end: it does
// so while the file is there.
func (c *configured) misbehave(ctx context.Context) error {
	s := c.now.Load()
	if s.file != "" {
		if _, err := os.Stat(s.file); errors.Is(err, os.ErrNotExist) {
			return nil
		}
	}
	switch s.mode {
	case "crash":
		os.Exit(3)
	case "panic":
		panic("the plugin panics")
	case "hang":
		<-ctx.Done()
		return ctx.Err()
	case "flood":
		for range 10_000 {
			fmt.Fprintln(os.Stderr, strings.Repeat("noise ", 20))
		}
	case "fail":
		return status.Error(codes.Internal, "it fails")
	}
	return nil
}

type agent struct {
	agentv1.UnimplementedNodeAttestorServer
	*configured
}

// AidAttestation proves a node by its name, and that it got the challenge.
func (a *agent) AidAttestation(stream agentv1.NodeAttestor_AidAttestationServer) error {
	if err := a.misbehave(stream.Context()); err != nil {
		return err
	}
	answer := &agentv1.PayloadOrChallengeResponse{Data: &agentv1.PayloadOrChallengeResponse_Payload{Payload: []byte("node-1")}}
	switch a.now.Load().mode {
	case "large":
		answer.GetData().(*agentv1.PayloadOrChallengeResponse_Payload).Payload = make([]byte, 64<<10+1)
	case "deaf": // it answers what it has not read
		response := &agentv1.PayloadOrChallengeResponse{Data: &agentv1.PayloadOrChallengeResponse_ChallengeResponse{ChallengeResponse: []byte("x")}}
		for err := stream.Send(answer); err == nil; err = stream.Send(response) {
		}
		return nil
	}
	for {
		if err := stream.Send(answer); err != nil {
			return err
		}
		challenge, err := stream.Recv()
		if err != nil {
			return nil // the server is satisfied
		}
		answer = &agentv1.PayloadOrChallengeResponse{Data: &agentv1.PayloadOrChallengeResponse_ChallengeResponse{ChallengeResponse: challenge.Challenge}}
	}
}

type server struct {
	serverv1.UnimplementedNodeAttestorServer
	*configured
	agents agentstorev1.AgentStoreServiceClient
}

// BrokerHostServices takes the agent store, which says whether an agent is there.
func (s *server) BrokerHostServices(broker pluginsdk.ServiceBroker) error {
	if !broker.BrokerClient(&s.agents) {
		return errors.New("there is no agent store")
	}
	return nil
}

// Attest has the agent send back a challenge, and believes the name it gave.
func (s *server) Attest(stream serverv1.NodeAttestor_AttestServer) error {
	ctx := stream.Context()
	req, err := stream.Recv()
	if err != nil {
		return err
	}
	node := string(req.GetPayload())
	if err := s.misbehave(ctx); err != nil {
		return err
	}
	c := s.now.Load()
	challenges := 1
	if c.mode == "challenges" {
		challenges = 100
	}
	for range challenges {
		nonce := []byte(rand.Text())
		if err := stream.Send(&serverv1.AttestResponse{Response: &serverv1.AttestResponse_Challenge{Challenge: nonce}}); err != nil {
			return err
		}
		if req, err = stream.Recv(); err != nil {
			return err
		}
		if !bytes.Equal(req.GetChallengeResponse(), nonce) {
			return status.Error(codes.PermissionDenied, "that was not the challenge")
		}
	}
	id, selectors := "spiffe://"+c.trustDomain+"/spire/agent/example/"+node, []string{"node:" + node}
	switch c.mode {
	case "foreign":
		id = "spiffe://elsewhere.org/spire/agent/example/" + node
	case "other":
		id = "spiffe://" + c.trustDomain + "/spire/agent/join_token/" + node
	case "workload":
		id = "spiffe://" + c.trustDomain + "/admin"
	case "itself":
		id = "spiffe://" + c.trustDomain + "/spire/agent/example"
	case "many":
		selectors = make([]string, 1001)
		for i := range selectors {
			selectors[i] = fmt.Sprint("n:", i)
		}
	}
	if _, err := s.agents.GetAgentInfo(ctx, &agentstorev1.GetAgentInfoRequest{AgentId: id}); err == nil {
		selectors = append(selectors, "seen:before")
	} else if code := status.Code(err); code != codes.NotFound && c.mode == "" {
		return err
	}
	return stream.Send(&serverv1.AttestResponse{Response: &serverv1.AttestResponse_AgentAttributes{
		AgentAttributes: &serverv1.AgentAttributes{SpiffeId: id, SelectorValues: selectors, CanReattest: true},
	}})
}

type workload struct {
	workloadv1.UnimplementedWorkloadAttestorServer
	*configured
}

// Attest says what the name of a process is.
func (w *workload) Attest(ctx context.Context, req *workloadv1.AttestRequest) (*workloadv1.AttestResponse, error) {
	if err := w.misbehave(ctx); err != nil {
		return nil, err
	}
	switch w.now.Load().mode {
	case "many":
		return &workloadv1.AttestResponse{SelectorValues: make([]string, 1001)}, nil
	case "huge":
		return &workloadv1.AttestResponse{SelectorValues: []string{strings.Repeat("x", 5<<20)}}, nil
	case "long":
		return &workloadv1.AttestResponse{SelectorValues: []string{strings.Repeat("x", 5<<10)}}, nil
	case "control":
		return &workloadv1.AttestResponse{SelectorValues: []string{"good", "a\nb"}}, nil
	case "empty":
		return &workloadv1.AttestResponse{SelectorValues: []string{"good", ""}}, nil
	case "usurper":
		return &workloadv1.AttestResponse{SelectorValues: []string{"unix:uid:0"}}, nil
	}
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", req.Pid))
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &workloadv1.AttestResponse{SelectorValues: []string{"comm:" + strings.TrimSpace(string(name)), fmt.Sprint("plugin:", os.Getpid())}}, nil
}
