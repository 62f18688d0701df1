package azureimds

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hallmark-id/hallmark/attestors/cloud"
	"github.com/hallmark-id/hallmark/attestors/pemfile"
)

// DescribeConfig says how the Azure Resource Graph is asked: as an application, by
// a secret or a token of another issuer that it trusts, or else as the managed
// identity of the machine that the server is on. It needs the role Reader in the
// subscriptions.
type DescribeConfig struct {
	// AppID is the ID of the application, a GUID. Default: none, the managed
	// identity asks.
	AppID string `yaml:"app_id" env:"expand"`
	// AppSecret is the application's secret. Default: none.
	AppSecret string `yaml:"app_secret" env:"expand"`
	// TokenPath is a file with a token for the application, a federated
	// credential, read each time that one is needed. Default: none.
	TokenPath string `yaml:"token_path" env:"expand"`
	// AllowedVMTags are the tags of machines that become selectors. Default: none.
	AllowedVMTags []string `yaml:"allowed_vm_tags"`
	// Endpoint is the URL of the Azure Resource Manager: HTTPS, or HTTP on this
	// machine. Default https://management.azure.com.
	Endpoint string `yaml:"endpoint" env:"expand"`
	// LoginEndpoint is the URL of Microsoft Entra: HTTPS, or HTTP on this machine.
	// Default https://login.microsoftonline.com.
	LoginEndpoint string `yaml:"login_endpoint" env:"expand"`
	// MetadataAddress is the URL of the metadata service that has the managed
	// identity's tokens, without a path. Default http://169.254.169.254.
	MetadataAddress string `yaml:"metadata_address" env:"expand"`
}

const (
	defaultEndpoint = "https://management.azure.com"
	defaultLogin    = "https://login.microsoftonline.com"
	maxAnswer       = 1 << 20  // bytes
	maxToken        = 32 << 10 // bytes
	maxInterfaces   = 100      // and subnets, of one machine
	earlier         = 5 * time.Minute
	formType        = "application/x-www-form-urlencoded"
	assertionType   = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
)

// graph asks the Azure Resource Graph about the machines of a tenant.
type graph struct {
	c        DescribeConfig
	tenant   string
	api      *cloud.Service
	metadata *cloud.Service
	now      func() time.Time

	mu      sync.Mutex
	token   string
	expires time.Time
}

func newGraph(tenant string, c DescribeConfig, now func() time.Time) (*graph, error) {
	switch {
	case len(c.AllowedVMTags) > maxListed:
		return nil, fmt.Errorf("allowed_vm_tags has %d items; the most is %d", len(c.AllowedVMTags), maxListed)
	case c.AppID == "" && (c.AppSecret != "" || c.TokenPath != ""):
		return nil, errors.New("app_id is missing; it says whose app_secret or token_path it is")
	case c.AppID != "" && (c.AppSecret == "") == (c.TokenPath == ""):
		return nil, errors.New("app_id needs one of app_secret and token_path")
	case c.AppID != "" && !guidForm.MatchString(strings.ToLower(c.AppID)):
		return nil, fmt.Errorf("app_id is %q; write the application's ID, a GUID", c.AppID)
	}
	for _, one := range []struct {
		name, usual string
		value       *string
	}{{"endpoint", defaultEndpoint, &c.Endpoint}, {"login_endpoint", defaultLogin, &c.LoginEndpoint}} {
		if *one.value == "" {
			*one.value = one.usual
		}
		var err error
		if *one.value, err = cloud.CheckEndpoint(*one.value); err != nil {
			return nil, fmt.Errorf("%s: %w", one.name, err)
		}
	}
	if c.MetadataAddress == "" {
		c.MetadataAddress = cloud.MetadataAddress
	}
	metadata, err := cloud.Metadata(c.MetadataAddress)
	if err != nil {
		return nil, fmt.Errorf("metadata_address: %w", err)
	}
	return &graph{c: c, tenant: tenant, api: cloud.API(), metadata: metadata, now: now}, nil
}

// machine is what the graph says of one.
type machine struct {
	ID            string         `json:"id"`
	Name          string         `json:"name"`
	Location      string         `json:"location"`
	ResourceGroup string         `json:"resourceGroup"`
	Tags          map[string]any `json:"tags"`
	VMID          string         `json:"vmId"`
	Subscription  string         `json:"subscriptionId"`
	Tenant        string         `json:"tenantId"`
	ScaleSet      string         `json:"scaleSet"` // its ID

	interfaces []networkInterface
}

type networkInterface struct {
	SecurityGroup string `json:"securityGroup"` // its ID
	Addresses     []struct {
		Properties struct {
			Subnet struct {
				ID string `json:"id"`
			} `json:"subnet"`
		} `json:"properties"`
	} `json:"addresses"`
}

// IDs of resources, without regard to case as Azure has them.
var (
	scaleSetID = regexp.MustCompile(`(?i)/providers/Microsoft\.Compute/virtualMachineScaleSets/([^/]+)$`)
	groupID    = regexp.MustCompile(`(?i)/resourceGroups/([^/]+)/providers/Microsoft\.Network/networkSecurityGroups/([^/]+)$`)
	subnetID   = regexp.MustCompile(`(?i)/providers/Microsoft\.Network/virtualNetworks/([^/]+)/subnets/([^/]+)$`)
)

func (m *machine) selectors(tags []string) []string {
	out := []string{"vm-name:" + m.Name, "vm-location:" + m.Location, "resource-group:" + m.ResourceGroup}
	if found := scaleSetID.FindStringSubmatch(m.ScaleSet); found != nil {
		out = append(out, "vmss-name:"+found[1])
	}
	for key, value := range m.Tags {
		if text, ok := value.(string); ok && slices.Contains(tags, key) {
			out = append(out, "vm-tag:"+key+":"+text)
		}
	}
	for _, one := range m.interfaces {
		if found := groupID.FindStringSubmatch(one.SecurityGroup); found != nil {
			out = append(out, "network-security-group:"+found[1]+":"+found[2])
		}
		for _, address := range one.Addresses {
			if found := subnetID.FindStringSubmatch(address.Properties.Subnet.ID); found != nil {
				out = append(out, "virtual-network:"+found[1], "virtual-network-subnet:"+found[1]+":"+found[2])
			}
		}
	}
	return out
}

// describe asks about a document's machine. The error is for the node if the
// machine is not there, or else an [unavailable].
func (g *graph) describe(ctx context.Context, d *document) (*machine, error) {
	var found []*machine
	// The ID is a GUID, and cannot end the text that it is in.
	err := g.ask(ctx, d.SubscriptionID, `resources
| where type =~ 'microsoft.compute/virtualmachines' and properties.vmId =~ '`+d.VMID+`'
| project id, name, location, resourceGroup, tags, subscriptionId, tenantId, vmId = tostring(properties.vmId), scaleSet = tostring(properties.virtualMachineScaleSet.id)`, &found)
	if err != nil {
		return nil, unavailable{fmt.Errorf("describe the machine %s: %w", d.VMID, err)}
	}
	if len(found) != 1 || found[0] == nil {
		return nil, errors.New("machine is gone, or not in the Azure Resource Graph, as those of a scale set in uniform orchestration are not")
	}
	m := found[0]
	switch {
	case !strings.EqualFold(m.VMID, d.VMID) || !strings.EqualFold(m.Subscription, d.SubscriptionID):
		return nil, unavailable{fmt.Errorf("the Azure Resource Graph described another machine than %s of the subscription %s", d.VMID, d.SubscriptionID)}
	case !strings.EqualFold(m.Tenant, g.tenant):
		return nil, unavailable{fmt.Errorf("subscription %s is of the tenant %s, not of %s under which it is configured", d.SubscriptionID, m.Tenant, g.tenant)}
	case strings.ContainsAny(m.ID, `'"\`) || m.ID == "":
		return nil, unavailable{fmt.Errorf("machine %s has the ID %q, of which nothing can be asked", d.VMID, m.ID)}
	}
	err = g.ask(ctx, d.SubscriptionID, `resources
| where type =~ 'microsoft.network/networkinterfaces' and properties.virtualMachine.id =~ '`+m.ID+`'
| project securityGroup = tostring(properties.networkSecurityGroup.id), addresses = properties.ipConfigurations`, &m.interfaces)
	if err != nil {
		return nil, unavailable{fmt.Errorf("network interfaces of the machine %s: %w", d.VMID, err)}
	}
	n := len(m.interfaces)
	for _, one := range m.interfaces {
		n += len(one.Addresses)
	}
	if n > maxInterfaces {
		return nil, unavailable{fmt.Errorf("machine %s has more than %d network interfaces and addresses", d.VMID, maxInterfaces)}
	}
	return m, nil
}

// ask asks the graph about the resources of a subscription.
func (g *graph) ask(ctx context.Context, subscription, query string, into any) error {
	token, err := g.bearer(ctx)
	if err != nil {
		return err
	}
	body, err := json.Marshal(map[string]any{
		"subscriptions": []string{subscription}, "query": query, "options": map[string]string{"resultFormat": "objectArray"},
	})
	if err != nil {
		return err
	}
	answer, err := g.api.Do(ctx, cloud.Question{
		Method: http.MethodPost, URL: g.c.Endpoint + "/providers/Microsoft.ResourceGraph/resources?api-version=2021-03-01",
		Header: map[string]string{"Authorization": "Bearer " + token, "Content-Type": "application/json"},
		Body:   string(body), Most: maxAnswer,
	})
	if err != nil {
		return err
	}
	var found struct {
		Data json.RawMessage `json:"data"`
	}
	if err := json.Unmarshal(answer.Body, &found); err != nil || found.Data == nil {
		return errors.New("the Azure Resource Graph answered with something else than resources")
	}
	if err := json.Unmarshal(found.Data, into); err != nil {
		return fmt.Errorf("the Azure Resource Graph answered with something else than was asked: %w", err)
	}
	return nil
}

// bearer returns a token for the Resource Manager. The lock is held while it is
// got, so that it is got once.
func (g *graph) bearer(ctx context.Context) (string, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.token != "" && g.now().Before(g.expires) {
		return g.token, nil
	}
	var answer *cloud.Answer
	var err error
	if g.c.AppID == "" {
		answer, err = g.metadata.Do(ctx, cloud.Question{
			URL:    "/metadata/identity/oauth2/token?" + url.Values{"api-version": {"2018-02-01"}, "resource": {g.c.Endpoint + "/"}}.Encode(),
			Header: map[string]string{"Metadata": "true"}, Most: maxToken,
		})
		if err != nil {
			return "", fmt.Errorf("token of the managed identity: %w", err)
		}
	} else {
		form := url.Values{"grant_type": {"client_credentials"}, "client_id": {g.c.AppID}, "scope": {g.c.Endpoint + "/.default"}}
		if g.c.AppSecret != "" {
			form.Set("client_secret", g.c.AppSecret)
		} else {
			token, err := pemfile.Read(g.c.TokenPath, maxToken)
			if err != nil {
				return "", fmt.Errorf("token_path: %w", err)
			}
			form.Set("client_assertion_type", assertionType)
			form.Set("client_assertion", strings.TrimSpace(string(token)))
		}
		answer, err = g.api.Do(ctx, cloud.Question{
			Method: http.MethodPost, URL: g.c.LoginEndpoint + "/" + g.tenant + "/oauth2/v2.0/token",
			Header: map[string]string{"Content-Type": formType}, Body: form.Encode(), Most: maxToken,
		})
		if err != nil {
			return "", fmt.Errorf("token of the application %s: %w", g.c.AppID, err)
		}
	}
	token, life, err := parseToken(answer.Body)
	if err != nil {
		return "", err
	}
	g.token, g.expires = token, g.now().Add(life-earlier)
	return token, nil
}

// parseToken reads a token and how long it is good. IMDS writes the number as text.
func parseToken(data []byte) (string, time.Duration, error) {
	var answer struct {
		AccessToken string      `json:"access_token"`
		ExpiresIn   json.Number `json:"expires_in"`
	}
	if err := json.Unmarshal(data, &answer); err != nil {
		return "", 0, errors.New("answered with something else than a token")
	}
	token, err := cloud.Token([]byte(answer.AccessToken))
	if err != nil {
		return "", 0, err
	}
	const longest = 48 * 60 * 60 // seconds
	seconds, err := answer.ExpiresIn.Int64()
	if err != nil || seconds <= 0 || seconds > longest {
		return "", 0, errors.New("answered with a token of which it does not say how long it is good")
	}
	return token, time.Duration(seconds) * time.Second, nil
}
