package test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/test/harness"
)

// TestAnEC2InstanceNeedsNoSecret attests an agent at the real address of the
// metadata service, in a network of its own, by a document that is signed as AWS
// signs them, gives a process an identity by a tag that the EC2 API knows, and
// lets nobody be the instance a second time until its agent is evicted.
func TestAnEC2InstanceNeedsNoSecret(t *testing.T) {
	t.Parallel()
	network := harness.NewNetwork(t)
	aws := harness.NewAWS(t, harness.EC2Instance{
		Account: "123456789012", Region: "us-west-2", ID: "i-1234567890abcdef0", Started: time.Now().Add(-time.Minute),
		Tags: map[string]string{"team": "shop"}, Groups: [][2]string{{"sg-01234567", "web"}}, Profile: "Blog",
	})
	aws.Key("AKIASERVER", "secret")
	network.Serve(t, harness.MetadataAddress+":80", aws.Metadata(t))
	network.Serve(t, "127.0.0.1:8443", aws.API())
	dir := publicDir(t)
	d := harness.NewDomain(t, harness.Settings{
		Network:   network,
		ServerEnv: []string{"AWS_ACCESS_KEY_ID=AKIASERVER", "AWS_SECRET_ACCESS_KEY=secret"},
		Server: fmt.Sprintf("node_attestors: {aws_iid: {account_allow_list: ['123456789012'], max_age: 1h, "+
			"certificates: [{region: us-west-2, path: %s}], describe: {assume_role: hallmark, endpoint: 'http://127.0.0.1:8443'}}}\n", aws.Certificate),
		Agent: fmt.Sprintf("trust_bundle: %s/bundle.pem\nnode_attestor: {aws_iid: {}}\n", dir),
	})
	d.StartServer(t)
	must(t, os.WriteFile(filepath.Join(dir, "bundle.pem"), []byte(d.Admin(t, "bundle", "show", "-o", "pem")), 0o644))
	d.StartAgent(t, "")

	const agent = "spiffe://example.org/spire/agent/aws_iid/123456789012/us-west-2/i-1234567890abcdef0"
	shown := d.Admin(t, "node", "show", agent, "-o", "json")
	for _, want := range []string{`"aws_iid:tag:team:shop"`, `"aws_iid:sg:name:web"`, `"aws_iid:iamrole:arn:aws:iam::123456789012:role/Blog"`, `"aws_iid:az:us-west-2a"`} {
		if !strings.Contains(shown, want) {
			t.Errorf("no %s in\n%s", want, shown)
		}
	}
	identifies(t, d, "aws_iid:tag:team:shop")
	admitsOnce(t, d, agent)
}

// publicDir makes a directory that every user may read.
func publicDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "hallmark-cloud-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	must(t, os.Chmod(dir, 0o755))
	return dir
}

// identifies gives a process an identity by a selector of its node.
func identifies(t *testing.T, d *harness.Domain, selector string) {
	t.Helper()
	d.Admin(t, "entry", "create", "--spiffe-id", "/node", "--parent-id", "/spire/server", "--selector", selector)
	d.Entry(t, "/echo", echoUID)
	fetch := harness.Command{Args: []string{"fetch", "x509", "--socket", d.Socket}, UID: echoUID}
	if out := fetch.Run(t); !strings.Contains(out, "spiffe://example.org/echo") {
		t.Errorf("fetch x509 printed:\n%s", out)
	}
}

// admitsOnce has an agent lose its identity: the proof that it was admitted by is
// not good for another until an operator says so.
func admitsOnce(t *testing.T, d *harness.Domain, agent string) {
	t.Helper()
	d.Agent.Stop(t)
	data := filepath.Join(d.Dir, "agent", "data")
	must(t, os.Rename(data, data+".lost"))
	again := harness.Command{Args: []string{"agent", "run", "-c", filepath.Join(d.Dir, "agent.yaml")}, UID: harness.AgentUID, Network: d.Network()}
	_, stderr, code := again.Try(t)
	if code == 0 || !strings.Contains(stderr, "this node has an agent already") || !strings.Contains(stderr, "hallmark node evict") {
		t.Fatalf("a second agent ended with %d:\n%s", code, stderr)
	}
	d.Admin(t, "node", "evict", agent, "--yes")
	d.StartAgent(t, "")
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
