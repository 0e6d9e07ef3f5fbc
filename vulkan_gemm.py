# SPDX-License-Identifier: MIT
"""Matrix products on any GPU, with only the Python standard library (ctypes and the system's Vulkan loader).

    with VulkanGemm() as gpu:
        c = gpu.matmul(a, b)            # lists of rows in, lists of rows out, float32 inside

`python vulkan_gemm.py` lists the devices and checks the products of the one that it would use. The environment
variable MICROGPT_VULKAN_DEVICE (a number from that list) chooses another.

What a GPU program is. The *host* (this Python) finds a *device* and opens it. It asks for *memory* that both
can reach and puts the inputs there. A *pipeline* is a compiled device program (a *shader*, here gemm.comp)
along with the shape of its arguments. A *descriptor set* says which buffers those arguments are. The host
writes a *command buffer*, a list of jobs ("run this pipeline on so many workgroups"), and submits it to a
*queue*. The device works on its own and raises a flag at the end, a *fence*, which the host waits for. Every
Vulkan call below is one of those steps. There are many because Vulkan hides nothing, but each is small.
"""
import base64, ctypes, hashlib, os, re, shutil, struct, subprocess, sys, threading, time, zlib
from array import array
from contextlib import ExitStack
from ctypes import addressof, byref, c_char, c_char_p, c_float, c_int32, c_size_t, c_uint32, c_uint64
from ctypes import c_void_p
from itertools import chain, product
from operator import mul
from random import Random

TILE = 64           # one workgroup of gemm.comp makes a TILE x TILE block of the result,
STEP = 16           # walks along K in steps of 16,
INVOCATIONS = 64    # and has this many invocations (GPU threads), 8 x 8
MAX_K = 1 << 15     # longer dot products take several dispatches, as some drivers cut a long loop short
MAX_TERMS = 1 << 27  # multiplications in one submission: less than half a second even at 1 GFLOP/s
WAIT_SLICE = 0.05   # seconds that Python cannot handle a signal


class VulkanError(RuntimeError):
    """Anything that keeps Vulkan from doing its work, in one line. `code` is the VkResult, or None."""

    def __init__(self, message, code=None):
        super().__init__(message)
        self.code = code


# ---- Results ---------------------------------------------------------------------------------------------
# Most Vulkan calls return a VkResult. 0 is success and a negative number is an error. Of the positive ones
# only VK_TIMEOUT matters here: a wait ran out of time.

VK_TIMEOUT, VK_ERROR_DEVICE_LOST = 2, -4
RESULT_NAMES = dict(zip(range(-1, -14, -1), """OUT_OF_HOST_MEMORY OUT_OF_DEVICE_MEMORY INITIALIZATION_FAILED
    DEVICE_LOST MEMORY_MAP_FAILED LAYER_NOT_PRESENT EXTENSION_NOT_PRESENT FEATURE_NOT_PRESENT
    INCOMPATIBLE_DRIVER TOO_MANY_OBJECTS FORMAT_NOT_SUPPORTED FRAGMENTED_POOL UNKNOWN""".split()))


# ---- Structures ------------------------------------------------------------------------------------------
# Vulkan takes its arguments in C structures. Each line declares one: its name, its sType if it has one, then
# the specification's field names in the specification's order. sType says which structure this is, and pNext
# starts a chain of extensions (unused here). A structure with an sType has both of them in front.
# The letters: u and i are 32-bit integers, q a 64-bit one, z a size_t, p a pointer, s a C string, c a byte,
# and h a handle, the 64-bit name of a Vulkan object (but instances, devices, queues and command buffers are
# pointers). A number after the letter makes an array. VkPhysicalDeviceLimits has 106 fields. Those that do
# not matter here (of images, of graphics stages and the like) are folded into a few arrays.

LETTERS = {"u": c_uint32, "i": c_int32, "q": c_uint64, "h": c_uint64, "z": c_size_t, "c": c_char,
           "p": c_void_p, "s": c_char_p}

STRUCTURES = """
VkApplicationInfo 0 pApplicationName:s applicationVersion:u pEngineName:s engineVersion:u apiVersion:u
VkInstanceCreateInfo 1 flags:u pApplicationInfo:p enabledLayerCount:u ppEnabledLayerNames:p
    enabledExtensionCount:u ppEnabledExtensionNames:p
VkDeviceQueueCreateInfo 2 flags:u queueFamilyIndex:u queueCount:u pQueuePriorities:p
VkDeviceCreateInfo 3 flags:u queueCreateInfoCount:u pQueueCreateInfos:p enabledLayerCount:u
    ppEnabledLayerNames:p enabledExtensionCount:u ppEnabledExtensionNames:p pEnabledFeatures:p
VkSubmitInfo 4 waitSemaphoreCount:u pWaitSemaphores:p pWaitDstStageMask:p commandBufferCount:u
    pCommandBuffers:p signalSemaphoreCount:u pSignalSemaphores:p
VkMemoryAllocateInfo 5 allocationSize:q memoryTypeIndex:u
VkFenceCreateInfo 8 flags:u
VkBufferCreateInfo 12 flags:u size:q usage:u sharingMode:u queueFamilyIndexCount:u pQueueFamilyIndices:p
VkShaderModuleCreateInfo 16 flags:u codeSize:z pCode:p
VkPipelineShaderStageCreateInfo 18 flags:u stage:u module:h pName:s pSpecializationInfo:p
VkComputePipelineCreateInfo 29 flags:u stage:VkPipelineShaderStageCreateInfo layout:h basePipelineHandle:h
    basePipelineIndex:i
VkPipelineLayoutCreateInfo 30 flags:u setLayoutCount:u pSetLayouts:p pushConstantRangeCount:u
    pPushConstantRanges:p
VkPushConstantRange stageFlags:u offset:u size:u
VkDescriptorSetLayoutBinding binding:u descriptorType:u descriptorCount:u stageFlags:u pImmutableSamplers:p
VkDescriptorSetLayoutCreateInfo 32 flags:u bindingCount:u pBindings:p
VkDescriptorPoolSize type:u descriptorCount:u
VkDescriptorPoolCreateInfo 33 flags:u maxSets:u poolSizeCount:u pPoolSizes:p
VkDescriptorSetAllocateInfo 34 descriptorPool:h descriptorSetCount:u pSetLayouts:p
VkDescriptorBufferInfo buffer:h offset:q range:q
VkWriteDescriptorSet 35 dstSet:h dstBinding:u dstArrayElement:u descriptorCount:u descriptorType:u
    pImageInfo:p pBufferInfo:p pTexelBufferView:p
VkCommandPoolCreateInfo 39 flags:u queueFamilyIndex:u
VkCommandBufferAllocateInfo 40 commandPool:h level:u commandBufferCount:u
VkCommandBufferBeginInfo 42 flags:u pInheritanceInfo:p
VkMemoryBarrier 46 srcAccessMask:u dstAccessMask:u
VkMemoryRequirements size:q alignment:q memoryTypeBits:u
VkQueueFamilyProperties queueFlags:u queueCount:u timestampValidBits:u minImageTransferGranularity:u3
VkMemoryType propertyFlags:u heapIndex:u
VkMemoryHeap size:q flags:u
VkPhysicalDeviceMemoryProperties memoryTypeCount:u memoryTypes:VkMemoryType32 memoryHeapCount:u
    memoryHeaps:VkMemoryHeap16
VkExtensionProperties extensionName:c256 specVersion:u
VkPhysicalDeviceLimits imageLimits:u7 maxStorageBufferRange:u allocationLimits:u3 granularityLimits:q2
    graphicsLimits:u38 maxComputeSharedMemorySize:u maxComputeWorkGroupCount:u3
    maxComputeWorkGroupInvocations:u maxComputeWorkGroupSize:u3 otherLimits:q32
VkPhysicalDeviceProperties apiVersion:u driverVersion:u vendorID:u deviceID:u deviceType:u deviceName:c256
    pipelineCacheUUID:c16 limits:VkPhysicalDeviceLimits sparseProperties:u5
"""


def declare(name, s_type, fields, declared):
    """Return the ctypes class for one line of the table. Pointer fields are given the object to point to."""
    pairs = [("sType", c_uint32), ("pNext", c_void_p)] if s_type else []
    for field, kind, length in re.findall(r"(\w+):([A-Za-z]+)(\d*)", fields):
        element = LETTERS.get(kind) or declared[kind]
        pairs.append((field, element * int(length) if length else element))
    pointers = {field for field, kind in pairs if kind is c_void_p}
    defaults = {"sType": int(s_type)} if s_type else {}

    def __init__(self, **values):
        self.pointees = values  # a structure holds bare addresses: keep alive what they point to
        values = {field: addressof(x) if field in pointers else x for field, x in values.items()}
        ctypes.Structure.__init__(self, **values, **defaults)

    return type(name, (ctypes.Structure,), {"_fields_": pairs, "__init__": __init__})


for _name, _s_type, _fields in re.findall(r"(?m)^(Vk\w+)(?: (\d+))?((?:\s+\w+:\w+)+)", STRUCTURES):
    globals()[_name] = declare(_name, _s_type, _fields, globals())

# The values of the specification's enumerations that are used here.
API_VERSION = 1 << 22                                           # Vulkan 1.0
ENUMERATE_PORTABILITY = 1                                       # VkInstanceCreateFlags
QUEUE_COMPUTE = 2                                               # VkQueueFlags
DEVICE_TYPES = {2: "discrete", 3: "virtual", 1: "integrated", 4: "cpu", 0: "other"}  # in order of preference
DEVICE_LOCAL, HOST_VISIBLE, HOST_COHERENT, HOST_CACHED = 1, 2, 4, 8  # VkMemoryPropertyFlags
STORAGE_USAGE = 32                                              # VkBufferUsageFlags
STORAGE_BUFFER, COMPUTE, BIND_COMPUTE = 7, 32, 1  # VkDescriptorType, VkShaderStageFlags, VkPipelineBindPoint
STAGE_COMPUTE, STAGE_HOST = 0x800, 0x4000                       # VkPipelineStageFlags
SHADER_READ, SHADER_WRITE, HOST_READ = 0x20, 0x40, 0x2000       # VkAccessFlags
ONE_TIME_SUBMIT = 1                                             # VkCommandBufferUsageFlags


# ---- The loader ------------------------------------------------------------------------------------------
# Vulkan's functions live in one system library, the loader, which passes each call on to the right driver.
# Each line is a function and the letters of its arguments; "=" marks those that return a VkResult.

FUNCTIONS = """
vkEnumerateInstanceExtensionProperties=ppp vkCreateInstance=ppp vkDestroyInstance:pp
vkEnumeratePhysicalDevices=ppp vkGetPhysicalDeviceProperties:pp vkGetPhysicalDeviceMemoryProperties:pp
vkGetPhysicalDeviceQueueFamilyProperties:ppp vkEnumerateDeviceExtensionProperties=pppp
vkCreateDevice=pppp vkDestroyDevice:pp vkGetDeviceQueue:puup
vkCreateBuffer=pppp vkDestroyBuffer:php vkGetBufferMemoryRequirements:php vkAllocateMemory=pppp
vkFreeMemory:php vkBindBufferMemory=phhq vkMapMemory=phqqup
vkCreateShaderModule=pppp vkDestroyShaderModule:php vkCreateDescriptorSetLayout=pppp
vkDestroyDescriptorSetLayout:php vkCreatePipelineLayout=pppp vkDestroyPipelineLayout:php
vkCreateComputePipelines=phuppp vkDestroyPipeline:php vkCreateDescriptorPool=pppp
vkDestroyDescriptorPool:php vkAllocateDescriptorSets=ppp vkUpdateDescriptorSets:pupup
vkCreateCommandPool=pppp vkDestroyCommandPool:php vkResetCommandPool=phu vkAllocateCommandBuffers=ppp
vkBeginCommandBuffer=pp vkEndCommandBuffer=p vkCmdBindPipeline:puh vkCmdBindDescriptorSets:puhuupup
vkCmdPushConstants:phuuup vkCmdDispatch:puuu vkCmdPipelineBarrier:puuuupupup vkCreateFence=pppp
vkDestroyFence:php vkResetFences=pup vkWaitForFences=pupuq vkQueueSubmit=puph vkQueueWaitIdle=p
"""

INSTALL = {"apt": "apt install libvulkan1 mesa-vulkan-drivers",
           "dnf": "dnf install vulkan-loader mesa-vulkan-drivers",
           "pacman": "pacman -S vulkan-icd-loader and your card's driver, such as vulkan-radeon",
           "zypper": "zypper install libvulkan1 and your card's driver, such as libvulkan_radeon",
           "apk": "apk add vulkan-loader and your card's driver, such as mesa-vulkan-ati",
           "brew": "brew install vulkan-loader molten-vk"}


def open_library():
    """Return the system's Vulkan loader, or on macOS at least MoltenVK, which can do without a loader."""
    names, folders = ["libvulkan.so.1", "libvulkan.so"], [""]
    if sys.platform == "win32":
        names = ["vulkan-1.dll"]
    elif sys.platform == "darwin":
        names = ["libvulkan.1.dylib", "libvulkan.dylib", "libMoltenVK.dylib"]
        folders += ["/opt/homebrew/lib", "/usr/local/lib"]  # Homebrew's; the system does not look there
    if "VULKAN_SDK" in os.environ:
        folders.append(os.path.join(os.environ["VULKAN_SDK"], "lib"))
    for name, folder in product(names, folders):
        try:
            return (ctypes.WinDLL if sys.platform == "win32" else ctypes.CDLL)(os.path.join(folder, name))
        except OSError:
            continue
    hints = {"win32": "install the driver of your graphics card", "darwin": INSTALL["brew"]}
    found = [command for program, command in INSTALL.items() if shutil.which(program)]
    hint = hints.get(sys.platform) or (found or ["install your system's Vulkan loader, libvulkan.so.1"])[0]
    raise VulkanError(f"no Vulkan loader on this system ({hint})")


class Vulkan:
    """The loader's functions, each with its argument types, and with its VkResult checked if it has one."""

    def __init__(self):
        library = open_library()
        for name, returns, letters in re.findall(r"(\w+)([=:])(\w+)", FUNCTIONS):
            function = getattr(library, name, None)
            if function is None:
                raise VulkanError(f"the Vulkan loader has no {name}")
            function.argtypes = [LETTERS[letter] for letter in letters]
            function.restype = c_int32 if returns == "=" else None
            setattr(self, name, self._checked(name, function) if returns == "=" else function)

    @staticmethod
    def _checked(name, function):
        def call(*arguments):
            result = function(*arguments)
            if result < 0:
                raise VulkanError(f"{name}: VK_ERROR_{RESULT_NAMES.get(result, result)}", result)
            return result
        return call

    def create(self, kind, device, info):
        """Call vkCreate<kind>(device, info) and return the new object's handle."""
        handle = c_uint64()
        getattr(self, "vkCreate" + kind)(device, byref(info), None, byref(handle))
        return handle.value

    @staticmethod
    def array_of(element, function, *arguments):
        """Return an array as Vulkan does, in two calls: one for the count, one for the elements."""
        count = c_uint32()
        function(*arguments, byref(count), None)
        elements = (element * count.value)()
        if count.value:
            function(*arguments, byref(count), elements)
        return list(elements[:count.value])


# ---- Instance and device ---------------------------------------------------------------------------------
# The instance is this program's connection to Vulkan, and through it the physical devices are listed. A
# device has families of queues, and any queue that can compute will do. Drivers that map Vulkan onto another
# interface (MoltenVK on macOS) are hidden unless a program says with a "portability" extension that it
# expects them.

def chosen_extensions(vk, function, owner, wanted):
    """Return those of the wanted extensions that there are, as arguments of vkCreate..."""
    offered = {each.extensionName for each in vk.array_of(VkExtensionProperties, function, *owner, None)}
    names = [name for name in wanted if name in offered]
    return {"enabledExtensionCount": len(names), "ppEnabledExtensionNames": (c_char_p * 2)(*names)}


def create_instance(vk):
    extensions = chosen_extensions(vk, vk.vkEnumerateInstanceExtensionProperties, [], [
        b"VK_KHR_get_physical_device_properties2", b"VK_KHR_portability_enumeration"])
    portability = b"VK_KHR_portability_enumeration" in list(extensions["ppEnabledExtensionNames"])
    application = VkApplicationInfo(pApplicationName=b"vulkan_gemm", apiVersion=API_VERSION)
    info = VkInstanceCreateInfo(flags=ENUMERATE_PORTABILITY if portability else 0,
                                pApplicationInfo=application, **extensions)
    instance = c_void_p()
    vk.vkCreateInstance(byref(info), None, byref(instance))
    return instance.value


class PhysicalDevice:
    """What a device says about itself before it is opened."""

    def __init__(self, vk, handle, index):
        self.handle, self.index = handle, index
        properties, self.memory = VkPhysicalDeviceProperties(), VkPhysicalDeviceMemoryProperties()
        vk.vkGetPhysicalDeviceProperties(handle, byref(properties))
        vk.vkGetPhysicalDeviceMemoryProperties(handle, byref(self.memory))
        self.limits = properties.limits
        self.name = properties.deviceName.decode(errors="replace")
        self.kind = DEVICE_TYPES.get(properties.deviceType, "other")
        families = vk.array_of(VkQueueFamilyProperties, vk.vkGetPhysicalDeviceQueueFamilyProperties, handle)
        self.queue_family = next((i for i, f in enumerate(families) if f.queueFlags & QUEUE_COMPUTE), None)
        self.usable = (self.queue_family is not None
                       and self.limits.maxComputeWorkGroupInvocations >= INVOCATIONS)

    def __str__(self):
        return f"device {self.index}: {self.name} ({self.kind}{'' if self.usable else ', unusable'})"


def list_devices(vk, instance):
    handles = vk.array_of(c_void_p, vk.vkEnumeratePhysicalDevices, instance)
    return [PhysicalDevice(vk, handle, index) for index, handle in enumerate(handles)]


def choose_device(devices):
    """Return the device that MICROGPT_VULKAN_DEVICE names by its index, or else the first of the best kind."""
    wanted = os.environ.get("MICROGPT_VULKAN_DEVICE", "")
    usable = [device for device in devices if device.usable and wanted in ("", str(device.index))]
    if not usable and wanted:
        there = "; ".join(map(str, devices)) or "there are none"
        raise VulkanError(f"MICROGPT_VULKAN_DEVICE={wanted} is not a usable device: {there}")
    if not usable:
        raise VulkanError("no Vulkan device on this system can run compute shaders")
    order = list(DEVICE_TYPES.values())
    return min(usable, key=lambda device: order.index(device.kind))


def create_device(vk, physical):
    extensions = chosen_extensions(vk, vk.vkEnumerateDeviceExtensionProperties, [physical.handle], [
        b"VK_KHR_portability_subset"])  # must be enabled where it is offered
    queue = VkDeviceQueueCreateInfo(queueFamilyIndex=physical.queue_family, queueCount=1,
                                    pQueuePriorities=c_float(1.0))
    info = VkDeviceCreateInfo(queueCreateInfoCount=1, pQueueCreateInfos=queue, **extensions)
    device = c_void_p()
    vk.vkCreateDevice(physical.handle, byref(info), None, byref(device))
    return device.value


# ---- Memory ----------------------------------------------------------------------------------------------
# A buffer is a range of bytes that shaders can use. It is bound to memory of one of the device's types, here
# always one that the host can see, and stays mapped, so that Python writes straight into it. Such a type
# suits every buffer: the specification promises it. Best for inputs is memory of the device's own. Many cards
# have a window of only 256 MB to it, shared by all programs, so the next best type must do when that is full.
# Results should be in "cached" memory, since the host reads any other very slowly. All is "coherent", which
# saves us flushing.

HOST = HOST_VISIBLE | HOST_COHERENT
FOR_INPUT, FOR_RESULT = (HOST | DEVICE_LOCAL, HOST), (HOST | HOST_CACHED, HOST)


class Buffer:
    """A buffer that grows by powers of two. The host sees its bytes in `mapped`, a ctypes array."""

    def __init__(self, vk, device, physical, preferences):
        self.vk, self.device, self.physical, self.preferences = vk, device, physical, preferences
        self.capacity, self.handle, self.mapped = 0, None, None
        self._undo = ExitStack()

    def reserve(self, size):
        """Make room for `size` bytes. If that takes a new buffer, what was in the old one is lost."""
        limit = self.physical.limits.maxStorageBufferRange & ~3
        if size > limit:
            raise VulkanError(f"{size} bytes in one buffer are more than the {limit} of {self.physical.name}")
        self.free()
        capacity = min(limit, max(1 << 16, 1 << (size - 1).bit_length()))
        info = VkBufferCreateInfo(size=capacity, usage=STORAGE_USAGE)
        self.handle = self.vk.create("Buffer", self.device, info)
        self._undo.callback(self.vk.vkDestroyBuffer, self.device, self.handle, None)
        self.mapped = (c_char * capacity).from_address(self._bind())
        self.capacity = capacity

    def _bind(self):
        """Give the buffer memory of the best type that has enough of it. Return where the host sees it."""
        needs = VkMemoryRequirements()
        self.vk.vkGetBufferMemoryRequirements(self.device, self.handle, byref(needs))
        failure = VulkanError(f"{self.physical.name} has no memory for a buffer of {needs.size} bytes")
        for index in self._memory_types(needs):
            info = VkMemoryAllocateInfo(allocationSize=needs.size, memoryTypeIndex=index)
            memory, address = c_uint64(), c_void_p()
            try:
                self.vk.vkAllocateMemory(self.device, byref(info), None, byref(memory))
                self._undo.callback(self.vk.vkFreeMemory, self.device, memory.value, None)
                self.vk.vkMapMemory(self.device, memory.value, 0, needs.size, 0, byref(address))
            except VulkanError as error:
                failure = error
                continue
            self.vk.vkBindBufferMemory(self.device, self.handle, memory.value, 0)
            return address.value
        raise failure

    def _memory_types(self, needs):
        """Return the indices of the memory types that suit the buffer, the best first."""
        types = self.physical.memory.memoryTypes[:self.physical.memory.memoryTypeCount]
        heaps = self.physical.memory.memoryHeaps
        suitable = [i for i, kind in enumerate(types)
                    if needs.memoryTypeBits >> i & 1 and needs.size <= heaps[kind.heapIndex].size
                    and kind.propertyFlags < 16]  # higher flags are of extensions
        return [i for flags in self.preferences for i in suitable if types[i].propertyFlags & flags == flags]

    def free(self):
        self.capacity, self.handle, self.mapped = 0, None, None
        self._undo.close()


# ---- Lists of rows and bytes -----------------------------------------------------------------------------
# The slow part of a small product is not the arithmetic but turning Python floats into packed 32-bit ones and
# back. One C call moves a whole row: struct.pack_into writes it straight to the memory that the device reads.

def shape_of(rows, name):
    height, width = len(rows), len(rows[0]) if len(rows) else 0
    if not width:
        raise ValueError(f"{name} is empty")
    if any(len(row) != width for row in rows):
        raise ValueError(f"the rows of {name} differ in length")
    return height, width


def write_rows(rows, buffer, offset):
    """Pack the rows into the buffer, starting at float number `offset`."""
    if sys.implementation.name == "pypy":  # where a call with hundreds of arguments is slow
        floats = array("f", chain.from_iterable(rows))
        ctypes.memmove(addressof(buffer.mapped) + 4 * offset, floats.buffer_info()[0], 4 * len(floats))
        return
    width, position, view = len(rows[0]), 4 * offset, memoryview(buffer.mapped)
    pack_into = struct.Struct(f"{width}f").pack_into
    for row in rows:
        pack_into(view, position, *row)
        position += 4 * width


def read_rows(buffer, offset, height, width):
    packed = ctypes.string_at(addressof(buffer.mapped) + 4 * offset, 4 * height * width)
    return list(map(list, struct.iter_unpack(f"{width}f", packed)))


# ---- Products --------------------------------------------------------------------------------------------
# All products of a call lie one after another in the buffers, and take a dispatch each in one submission,
# since a submission costs as much as a small product. Only large products are split: by rows and columns of
# the result so that a submission stays short (Windows resets a device that is busy for two seconds), and
# along K, where each dispatch adds to what the one before has left in C. A transposed matrix is never moved:
# the shader is told how far apart neighbors in a row and in a column are, and transposing swaps the two.

CONSTANTS = struct.Struct("13I")  # gemm.comp's: m, n, k, whether to add; place, row and column stride of A, B, C


def dispatches(shape, places, transpose_a, transpose_b):
    """Yield for each part of a product its push constants, its workgroups in x and y, its number of
    multiplications, and whether it adds to the part before. `places` are those of A, B and C, in floats."""
    (m, n, k), (a, b, c) = shape, places
    a_row, a_column = (1, m) if transpose_a else (k, 1)
    b_row, b_column = (1, k) if transpose_b else (n, 1)
    each = TILE * TILE * round_up(min(k, MAX_K), STEP)  # multiplications of a workgroup, with its padding
    wide = min(-(-n // TILE), MAX_TERMS // each)
    high = min(-(-m // TILE), MAX_TERMS // each // wide)
    firsts = product(range(0, m, high * TILE), range(0, n, wide * TILE), range(0, k, MAX_K))
    for row, column, first in firsts:
        height, width = min(high * TILE, m - row), min(wide * TILE, n - column)
        constants = CONSTANTS.pack(
            height, width, min(MAX_K, k - first), first > 0,
            a + row * a_row + first * a_column, a_row, a_column,
            b + first * b_row + column * b_column, b_row, b_column,
            c + row * n + column, n, 1)
        yield constants, -(-width // TILE), -(-height // TILE), high * wide * each, first > 0


def round_up(n, unit):
    return -(-n // unit) * unit


class VulkanGemm:
    """Matrix products on one device; a context manager. Threads that share it take turns."""

    def __init__(self, timeout=120.0):
        self.timeout, self.pending, self.closed = timeout, False, False
        self.clock = time.perf_counter
        self.shader_seconds = 0.0  # what the last call spent on the device, without turning lists into bytes
        self._descriptors_stale = True
        self._lock = threading.Lock()
        self._undo = ExitStack()  # how to free what was made so far, last made first
        try:
            self._open_device()
            self._make_pipeline(load_shader())
            self._make_descriptor_set()
            self._make_commands()
            self.buffers = [Buffer(self.vk, self.device, self.physical, preferences)
                            for preferences in (FOR_INPUT, FOR_INPUT, FOR_RESULT)]
            for buffer in self.buffers:
                self._undo.callback(buffer.free)
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        """Free everything. Does nothing the second time."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            try:
                self._finish_pending()
            except VulkanError as error:
                if error.code != VK_ERROR_DEVICE_LOST:
                    self._undo.pop_all()  # it may still be running: better to leak memory than to crash
            self._undo.close()

    def _create(self, kind, info):
        """Make an object of the device, to be destroyed at close()."""
        handle = self.vk.create(kind, self.device, info)
        self._undo.callback(getattr(self.vk, "vkDestroy" + kind), self.device, handle, None)
        return handle

    # -- Setting up: device, pipeline, descriptor set, command buffer and fence, each once.

    def _open_device(self):
        self.vk = vk = Vulkan()
        instance = create_instance(vk)
        self._undo.callback(vk.vkDestroyInstance, instance, None)
        self.physical = choose_device(list_devices(vk, instance))
        self.device = create_device(vk, self.physical)
        self._undo.callback(vk.vkDestroyDevice, self.device, None)
        queue = c_void_p()
        vk.vkGetDeviceQueue(self.device, self.physical.queue_family, 0, byref(queue))
        self.queue = queue.value

    def _make_pipeline(self, spirv):
        """Make a pipeline of the shader and the shape of its arguments: three buffers and push constants."""
        bindings = (VkDescriptorSetLayoutBinding * 3)()
        for i in range(3):
            bindings[i] = VkDescriptorSetLayoutBinding(
                binding=i, descriptorType=STORAGE_BUFFER, descriptorCount=1, stageFlags=COMPUTE)
        self.set_layout = self._create("DescriptorSetLayout", VkDescriptorSetLayoutCreateInfo(
            bindingCount=3, pBindings=bindings))
        constants = VkPushConstantRange(stageFlags=COMPUTE, size=CONSTANTS.size)
        self.layout = self._create("PipelineLayout", VkPipelineLayoutCreateInfo(
            setLayoutCount=1, pSetLayouts=c_uint64(self.set_layout),
            pushConstantRangeCount=1, pPushConstantRanges=constants))
        code = (c_uint32 * (len(spirv) // 4)).from_buffer_copy(spirv)
        module = self.vk.create("ShaderModule", self.device, VkShaderModuleCreateInfo(
            codeSize=len(spirv), pCode=code))
        try:
            stage = VkPipelineShaderStageCreateInfo(stage=COMPUTE, module=module, pName=b"main")
            info = VkComputePipelineCreateInfo(stage=stage, layout=self.layout, basePipelineIndex=-1)
            pipeline = c_uint64()
            self.vk.vkCreateComputePipelines(self.device, 0, 1, byref(info), None, byref(pipeline))
        finally:
            self.vk.vkDestroyShaderModule(self.device, module, None)  # the pipeline has its own copy
        self.pipeline = pipeline.value
        self._undo.callback(self.vk.vkDestroyPipeline, self.device, self.pipeline, None)

    def _make_descriptor_set(self):
        size = VkDescriptorPoolSize(type=STORAGE_BUFFER, descriptorCount=3)
        pool = self._create("DescriptorPool", VkDescriptorPoolCreateInfo(
            maxSets=1, poolSizeCount=1, pPoolSizes=size))
        info = VkDescriptorSetAllocateInfo(
            descriptorPool=pool, descriptorSetCount=1, pSetLayouts=c_uint64(self.set_layout))
        descriptor_set = c_uint64()
        self.vk.vkAllocateDescriptorSets(self.device, byref(info), byref(descriptor_set))
        self.descriptor_set = descriptor_set.value

    def _make_commands(self):
        self.command_pool = self._create("CommandPool", VkCommandPoolCreateInfo(
            queueFamilyIndex=self.physical.queue_family))
        info = VkCommandBufferAllocateInfo(commandPool=self.command_pool, commandBufferCount=1)
        commands = c_void_p()
        self.vk.vkAllocateCommandBuffers(self.device, byref(info), byref(commands))
        self.commands = commands.value
        self.fence = c_uint64(self._create("Fence", VkFenceCreateInfo()))

    # -- One call: lay out, write, record, submit, wait, read.

    def matmul(self, a, b, transpose_a=False, transpose_b=False):
        """Return op(a) op(b) as a list of rows, where op transposes if asked to."""
        return self.matmuls([a], [b], transpose_a, transpose_b)[0]

    def matmuls(self, a_list, b_list, transpose_a=False, transpose_b=False):
        """Return the product of each a with its b, of any shapes.

        Raises ValueError for shapes that do not fit, and VulkanError for all else, as for what is no number
        or above 3.4e38."""
        with self._lock:
            if self.closed:
                raise VulkanError("this VulkanGemm is closed")
            self._finish_pending()
            try:
                shapes, places, sizes = self._lay_out(a_list, b_list, transpose_a, transpose_b)
                if not shapes:
                    return []
                self._reserve(sizes)
                for matrices, buffer, offsets in zip((a_list, b_list), self.buffers, zip(*places)):
                    for rows, offset in zip(matrices, offsets):
                        write_rows(rows, buffer, offset)
            except (TypeError, OverflowError, struct.error) as error:
                raise VulkanError(f"not a matrix of float32 numbers: {error}") from None
            self._run([part for shape, place in zip(shapes, places)
                       for part in dispatches(shape, place, transpose_a, transpose_b)])
            return [read_rows(self.buffers[2], c, m, n) for (m, n, _), (_, _, c) in zip(shapes, places)]

    @staticmethod
    def _lay_out(a_list, b_list, transpose_a, transpose_b):
        """Return each product's (m, n, k) and its places in the three buffers, and the buffers' sizes, all in
        floats."""
        if len(a_list) != len(b_list):
            raise ValueError(f"{len(a_list)} left and {len(b_list)} right matrices")
        shapes, places, sizes = [], [], (0, 0, 0)
        for a, b in zip(a_list, b_list):
            (m, k), (other_k, n) = shape_of(a, "a"), shape_of(b, "b")
            m, k = (k, m) if transpose_a else (m, k)
            other_k, n = (n, other_k) if transpose_b else (other_k, n)
            if k != other_k:
                raise ValueError(f"cannot multiply {m} x {k} by {other_k} x {n}")
            shapes.append((m, n, k))
            places.append(sizes)
            sizes = sizes[0] + m * k, sizes[1] + k * n, sizes[2] + m * n
        return shapes, places, sizes

    def _reserve(self, sizes):
        """Grow the buffers if need be, and then tell the descriptor set where they are now."""
        for buffer, size in zip(self.buffers, sizes):
            if 4 * size > buffer.capacity:
                self._descriptors_stale = True
                buffer.reserve(4 * size)
        if not self._descriptors_stale:
            return
        infos = (VkDescriptorBufferInfo * 3)(*[
            VkDescriptorBufferInfo(buffer=buffer.handle, range=buffer.capacity) for buffer in self.buffers])
        write = VkWriteDescriptorSet(
            dstSet=self.descriptor_set, dstBinding=0, descriptorCount=3,  # bindings 0, 1 and 2 in a row
            descriptorType=STORAGE_BUFFER, pBufferInfo=infos)
        self.vk.vkUpdateDescriptorSets(self.device, 1, byref(write), 0, None)
        self._descriptors_stale = False

    def _run(self, parts):
        """Do all dispatches, in as few submissions as MAX_TERMS allows."""
        submissions, room = [], 0
        for part in parts:
            terms = part[3]
            if terms > room:
                submissions.append([])
                room = MAX_TERMS
            submissions[-1].append(part)
            room -= terms
        start = self.clock()
        for submission in submissions:
            self._record(submission)
            self._submit()
        self.shader_seconds = self.clock() - start

    def _record(self, parts):
        vk, commands = self.vk, self.commands
        vk.vkResetCommandPool(self.device, self.command_pool, 0)  # also after an interrupted recording
        vk.vkBeginCommandBuffer(commands, byref(VkCommandBufferBeginInfo(flags=ONE_TIME_SUBMIT)))
        vk.vkCmdBindPipeline(commands, BIND_COMPUTE, self.pipeline)
        sets = c_uint64(self.descriptor_set)
        vk.vkCmdBindDescriptorSets(commands, BIND_COMPUTE, self.layout, 0, 1, byref(sets), 0, None)
        for constants, x, y, _, adds in parts:
            if adds:
                self._barrier(STAGE_COMPUTE, SHADER_READ | SHADER_WRITE)
            vk.vkCmdPushConstants(commands, self.layout, COMPUTE, 0, CONSTANTS.size, constants)
            vk.vkCmdDispatch(commands, x, y, 1)
        self._barrier(STAGE_HOST, HOST_READ)
        vk.vkEndCommandBuffer(commands)

    def _barrier(self, stage, access):
        """Record that what shaders wrote is to be complete and visible before `stage` accesses it.

        Without this the device may run dispatches side by side and keep what they wrote in its own caches.
        What the host wrote needs none (submitting makes it visible), nor do two dispatches that write to
        different parts of C."""
        barrier = byref(VkMemoryBarrier(srcAccessMask=SHADER_WRITE, dstAccessMask=access))
        self.vk.vkCmdPipelineBarrier(self.commands, STAGE_COMPUTE, stage, 0, 1, barrier, 0, None, 0, None)

    def _submit(self):
        """Hand the command buffer to the device and wait until the fence says that it is done.

        An exception may interrupt this anywhere. Then `pending` stays set, and _finish_pending() cleans up.
        So the wait is in slices: Python handles signals only between them."""
        info = VkSubmitInfo(commandBufferCount=1, pCommandBuffers=c_void_p(self.commands))
        self.pending = True
        self.vk.vkQueueSubmit(self.queue, 1, byref(info), self.fence)
        slices, nanoseconds = int(self.timeout / WAIT_SLICE), int(WAIT_SLICE * 1e9)
        while self.vk.vkWaitForFences(self.device, 1, byref(self.fence), 1, nanoseconds) == VK_TIMEOUT:
            slices -= 1
            if slices <= 0:
                self.closed = True
                self._undo.pop_all()  # it is still running: better to leak memory than to crash
                raise VulkanError(f"{self.physical.name} has not finished after {self.timeout:g} seconds")
        self._reset_fence()

    def _reset_fence(self):
        self.vk.vkResetFences(self.device, 1, byref(self.fence))
        self.pending = False

    def _finish_pending(self):
        """Wait for a submission that was interrupted, whether or not it ever reached the device."""
        if self.pending:
            self.vk.vkQueueWaitIdle(self.queue)
            self._reset_fence()


# ---- The shader ------------------------------------------------------------------------------------------
# Vulkan takes shaders as SPIR-V, which glslc compiles from GLSL. This file carries gemm.comp compiled, along
# with the hash of its source. After an edit of gemm.comp, `python vulkan_gemm.py --compile` renews both.

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "gemm.comp")


def source_hash():
    """Return the SHA-256 of gemm.comp, whichever way its lines end."""
    with open(SOURCE, "rb") as file:
        return hashlib.sha256(file.read().replace(b"\r\n", b"\n")).hexdigest()


def load_shader():
    if os.path.exists(SOURCE) and source_hash() != SHADER_SHA256:
        raise VulkanError("gemm.comp was edited: run `python vulkan_gemm.py --compile`, which needs glslc")
    return zlib.decompress(base64.b64decode(SHADER_SPIRV))


def compile_shader():
    """Put the newly compiled shader and the hash of its source into this file."""
    done = subprocess.run(["glslc", "-O", SOURCE, "-o", "-"], stdout=subprocess.PIPE, check=True)
    encoded = base64.b64encode(zlib.compress(done.stdout, 9)).decode()
    lines = "\n".join(encoded[i:i + 108] for i in range(0, len(encoded), 108))
    with open(__file__, encoding="utf-8", newline="") as file:
        text = file.read()
    text = re.sub(r'(?m)^SHADER_SHA256 = ".*"', f'SHADER_SHA256 = "{source_hash()}"', text)
    text = re.sub(r'(?m)^SHADER_SPIRV = """[^"]*"""', f'SHADER_SPIRV = """\n{lines}\n"""', text)
    with open(__file__, "w", encoding="utf-8", newline="") as file:
        file.write(text)


SHADER_SHA256 = "aaa9fdb0192876baf0b417471d2df4b2ea1818cef3044b8688e1ecaae4626f4d"
SHADER_SPIRV = """
eNp1WglwldUV/u+9jwBSwFhxaREJcUqHTVqVWhNARFQUoRGwLlUgpKJG2ROwEseVsgwEFSh0qA7REcvWYBWXIqOiThEBixBl0cEQawfRKuNW
JU7v9853zMnPCzN3/ne27yz3nvPu/0Lwha2TxCXtkvZJx0yS/Zef+MhJIi8v+7x02MhhfaZNL+tz7nl9Ie+QhKweZB2TNkmr+ITp7eNumQh+
z7iKo3BwXCdGjEwWM4masmB3WbQ6Q9wlhXwqz5GXMTxPXhvyuuSw7ZLDtksLtoG8HxlehrwTDa8VeZ0NL4+8n6M2EUl9XBoRembrlmRjBj2d
+hJPJqlgvKcRryKVB/AqGB/sZ8Rntx9kQhcYel8Kf38Kf38O/P0G/70U/nvEd6S7OIvfKjnTHY8HnuIVuOZ4oAtMfXAuUJ+fkh5M+iekz/BC
nx7Xj6OVz8YTsvj43CnqIJ6u9HFKlOSTPjXKTuJZy2R5mYiRJPGAZ/knRwT46cIzlWdWl6TtD3tr1xlmAe/M+Gyb1U+SItJdyUNsBaRdtg+E
7sZ4lC5kLsA7i7Z5lOPZnfaQ9+DnPPrrwf5yRv+cRBwoXcQzrPTAuC40/ktYO5XfyBg6R3oMa3WjkY9lvJCPi88x5IEujc9x9Il4xzPXUsYL
uszkD7wJKbqcvQn7ydyv/GzNQ7Z/8rP1lr6YTr1KxlRBP6BnkKd5Vpk6zqUsn3I8F7AOkFczpnxjv5j9r3lspw7i2mfiQj/tI84B+tlPO9Dv
mbiQb6OpP/x0dHrWQrbfFBd9BRq4XZ1ggFdEusA1z7eQfYg+uICYgXEVOanFBbQHXUye0oNJY19vcXIOdJ9vjTR45cQrd7JP4PeKn6A7yUlN
7dKc50RZG+byJyd1hE2vKEVM6PtyngWc/36x8p71TpjHN5Gj+wH/tzGGIvb54hT95xT9WYo+lqLb+ub0qaQHRa/ou/6sGfavP/Ma4ISvOhdS
p7vRGeSErzoXs9ZWZ4gT/v1RB/QlTngDjf/LaGf9D3XCV7vLnfBgp7zh3DfEcTd5I5z4GG5sR1JvgNEb5QRzJOPHvPqtkxlXYuK4xgm/Nupg
xl7rxAf4X8fdu57fG99Gfciuiws87Ol1BvsGYlcZ7Bud8BV7jJO4wP9ftFccPL+MOwadsU5iaEX966hbSt1S6gL/nSA1hf20uMYbXzc7kaMu
X8V4yijXXG4mXUbc8dlc8rLnZzLPKOyRz4BYB/AmGZ0pRqeEOlOoo3swzWDYHMqYUwXpCpPTu8wJOgfjmmlqfCdrXGhqPMsJX/OucoIBPvKe
QQzNG/LKuGbQdyVzAn4vL/jdUj56e5Gtpo8+Xni2D8728v2GvPp6wcZT8/o2iA78zcTTN8V8jhf5OdyrOyjXmCE/N647iIvPOJvFRgcx9Yvr
19TB59nch/OJX8T4iqkD3bnUKaLOwJROscmhXUawgF1EX4hjSCqOgXFdRPuBxsegVBxDqHORifXiVByqM8TE0T4jWMC+mL70zA31Mh8Qq9Z3
mBe+9vQoEy9kV8Y1in6uNFi/8XKW2huskV74s3iG1W6Ub+rh0V58IuaRxNf8rvESG+4SWpdrvfDxnaV611Ov3OjdYGyRxzSTB3yOiWsq48Fn
Pddjzbm2s2+cF5nq/d7o2Tl2kxeZztsJrOdNplY3e8GbYHjlpn5qO9ELv7fRm+TFfiJjwZ1nspd7UQnl/Xn3meJFhtpPY65TU/Q07gX0O2TE
BvXA9/rUrI822XtThZc7HuLDHqDmqDFmGWSwBW4lcStNzDNT51R7/g5Tz/tYz8Wpet7vRabz5AEvvO7c13lmXyGbHdc84s82+H80+HZezfEi
W0P8uV543RmrYs0zZ3a+lzgQ/1z6hO4C6i4w/XeMswz2e+J628yyRV7kOsvqKNd8IH8wrjriPsgZstzoIJaH41pKnYdN/ywhvs6Q5dRZaubM
MuoMTOksNzlkMoIF7GX0hThqUnGsiOtR2q8wPh5JxVFDnUdNrCtTcahOjYkjLyNYwF5JX3rGnvByh0Gs+h24yh9/z3jSC1/34K9ebJ9kThtM
TpCtjmsDY1lt/K1jv+aZeVfrha/zTu02mLPzlBefyKuW+FqDZ7zEb+fdRi98O++eo56ddy8YW+TxlskDPjfFtZPxbDJ98aLpCzvvNnuRab4v
m3x1Pr3qhX+/0XvNi+2rxsfWFnrvDS8yxdvGvXjD4L3pBXObmXfbvbxvlVCu826HFxlq/xZz3Zmi3zLzrnVGbDZx3u00826Xl3dB5Is9QM1f
4LyDrDXn3dvEfdvEvCd1lnUuoI8PxljH8p1rDr9j55s7F+608+KazzvXPJ6lBaQXmPtfI+9/0Hk/rkXmbvewE3kRZ0s15eoH8oVxVRN3YfZu
1zr73rbMyaxv5H0V7xT9+bvLcspRB7yLLTd2fzF2VSm7RyiHHd7ZHjF2NU5qrf4GGLvHKFfdVUa3KqX7JOWo12rmtdrUy2ekXsj1QFxrTL1q
ncgnsF5rKdd61ZJeS9w1vGvjt4y/O3kvhb2exaed8BdGHcS20UkuT5v3gmf5XgA77T3oPudEdg9tn3fC28j6Qfa8a/K1OeXrJSe12Gx8vWx8
VRlfrziRqa8tTngv0RdkW8x7yuumTpr/P528h9v8tzrha0zbmP9WE9ObjAmYNv/tTmQa0w4nvG2MCbIdJv/dKV91zH+38fWO8WXzf9eJTH3t
dcKroy/I9pr8D5ga2nO2luduEelFxuZ913RebS9X00Z7Hc/0fIB8JuUzDeZBvrvpd6q+H86gTT3penP+93JeQKdznEUfmvP/HydyPf8NTuR6
/iE/FFcDcQ+ZWD7m7wCw13p/znrvDc339qgTGWqL32qOcgaeIn9uSL6LnxHjAc5MPNczxoNefOm7Sb35joPsg7jqafcB5z5ws3UgfYjyQ+Ze
sY91gc7J8fNJQWrQiZ8T1riBtg3m/vBvL/b6vfupiQmyj+L6lHYfme+Iw15+39gXmu4rH+e4rxzxwld/n3ixPcJ8FPtTc8f4r5e4EOcnjAHx
gP9ZXJ1Yk8/Md/Tn9N3RNb8HHPUiU70vjJ6N80svMv0u/4p79aXJ+WsveF8Z3rfN6iA+vjM+7H3hmBeZ+mj0Yn/M4H3vxU+jb6orfljsyt9O
FcsF4eu93wfhNXIfO4amfYQsxNWOdQuh6S7SKshvtCX0rTMpL4hMZ2SbIL9NIk/VaRuEj9kD+oQgduBjbzvSXzuD0z4HTocgfGuDp95zDgTB
RtwdmIfGn5+KH30J3gHinUQ8PLXG6JF9Zp5pT3UKzXvuFGPzDX/Pk+8NmRGNZkbYmfy9Exliwe+337Pfr07NiM70gyfk3ULzeVAQ6W7UKWBs
V5PuRrqQdGFomgf1PAfQGRXXVZwHo/lZ58FZtMVT+/NnQex1HvQxMUHWPa4+tOtu6tMjSI3qzTzoGY6fB72C8NVf7yC2vZiPYvcJTfPg7CBx
Ic7ejAHxgN83rtG06Wt68Bch9zz4ZRCZ6p0bcs+D84LItFf7BZkH55mcfxUEr5/hXdCsDuKjKOSeB8VBZOqjfxD7YoM3IIif/qauF+aYB4OC
8HUeXBSEp/NghNlHyAbHdQXrNtj00xDTTwNMj14SRKZ9fFmQv03UG52hQfg6Dy4PYjeUezuC/q4wOFfmwBkehG9tRph50BAEG3EPZx4af0kq
fvQgeA3Eu4p4V5kaj+KZ13mgPTU61XNXG5vA7wf0ifJa+aY7iM6IE7zMCMjsPaKdFxniw9902vH9fWlqRvyOvvHUe8TYIP71HlFq9haycXGV
0m4cc1hKupT0eNLjzdw4zPMCncVxPcS5sYSfdW6U0bbM9PFNQex1bkw0MUE2Ia6JtJtg6nhrkLl62Jzv8hxz47YgfPV3exDb25iPYk80c2NS
kLgQ5+2MAfGAPzmuJbSZbHp1SgtzY2oQmepNb2FuVASRaU9Xcq8qTM4zguBVGt4fmtVBfNzZwtyYFUSmPqqC2M8yeHcF8VNl6np3jrlxTxC+
zo17g/B0blSbfYTsvrjms273mb57wPTdXaaXZweRab/PCfI3zMNGZ24Qvs6NeUHs5nJvq+lvvsFZkANnYRC+tak2c+NIEGzEvZB5aPwPpuJH
X4J3hHgPEe8hU+PFPPM6N7SnlqR6bql5rzjNzAN7Zzjdiwx+8Tfd0zkP6lLzYAUxV/DOUJPq/ZVx1VBnJeOoI11D+jHSj5neP8o9h87uuHax
9/fws/b+47R93PTiE0HstffXm5ggW4XZRbtVpn6r+V151JzRNTl6f20QvvpbF8R2LfNR7PWm9/8WJC7EuY4xIB7wa+PaQ5ta028bWuj9p4LI
VO/pFnr/mSAy7cuN7P1nTM7PBsHbaHgvNKuD+PhHC72/KYhMfbwYxH6TwdscxM+Lpq4v5ej9l4PwtfdfCcLT3t9p9hGyLXFtY922mN55zfTO
ZtOPrweR/fA7S5D/r3DU6GwNwtfefyOI3Vbu7U7622ZwtufA2RGEb212mt7/Igg24t7BPDT+f6XiRw+C9wXxdhFvl6nxbp557X3tqT2pnqsj
/SF/d/jQ/O7Q2Te9O9jfPBqy/3/CJefH9X8J2Yfz
"""


# ---- Which products gain ---------------------------------------------------------------------------------
# In plain Python a product costs so much for each multiplication, and zeros are skipped. On the device it
# costs a trip, however small it is, so much for each number that travels, and so much for each multiplication
# of whole tiles. All four are measured once. Then each call goes where it is cheaper.

def offload(gpu, plain_matmuls):
    """Return a function of a list of matrices as rows and a list of matrices as columns. It computes their
    products on the GPU if that is faster than plain_matmuls, which does the same."""
    def on_gpu(many_rows, many_columns):
        return gpu.matmuls(many_rows, many_columns, transpose_b=True)

    def seconds(matmuls, n):
        """Time a product of two n x n matrices: in all, and on the device. Other programs disturb this, so
        the shortest of several counts."""
        matrix = [[0.1 + 0.01 * (i + j) for i in range(n)] for j in range(n)]
        times = []
        for _ in range(6):
            start = gpu.clock()
            matmuls([matrix], [matrix])
            times.append((gpu.clock() - start, gpu.shader_seconds))
        return min(times)

    check_products(gpu)
    plain_term = seconds(plain_matmuls, 32)[0] / 32 ** 3
    trip, trip_on_device = seconds(on_gpu, 8)
    total, on_device = seconds(on_gpu, 128)
    number = (total - on_device) / (3 * 128 ** 2)
    term = max(0.0, on_device - trip_on_device) / 128 ** 3

    def filled(rows):
        """Return about how much of the plain product's time remains where it skips zeros. Every seventh row
        tells: contexts and batches are often powers of two."""
        some = rows[::7]
        return min(1.0, 2 - 2 * sum(row.count(0.0) for row in some) / (len(some) * len(some[0])))

    def gain(rows, columns):
        """Return how many seconds a product costs less on the GPU, without the trip."""
        m, k, n = len(rows), len(rows[0]), len(columns)
        plain = m * n * k * plain_term * min(filled(rows), filled(columns))
        on_device = round_up(m, 8) * round_up(n, 8) * round_up(k, STEP) * term
        return plain - (m * k + k * n + m * n) * number - on_device

    def matmuls(many_rows, many_columns):
        if sum(map(gain, many_rows, many_columns)) > trip:
            return on_gpu(many_rows, many_columns)
        return plain_matmuls(many_rows, many_columns)

    return matmuls


def check_products(gpu):
    """Raise VulkanError if products of awkward shapes, transposed or not, differ from plain Python's."""
    rng = Random(1)
    for (m, n, k), *transpose in product([(1, 1, 1), (17, 33, 1), (3, 5, 130), (65, 66, 17)], *[(False, True)] * 2):
        rows, columns = ([[rng.uniform(-1, 1) for _ in range(k)] for _ in range(size)] for size in (m, n))
        a = list(zip(*rows)) if transpose[0] else rows
        b = columns if transpose[1] else list(zip(*columns))
        for row, results in zip(rows, gpu.matmul(a, b, *transpose)):
            for column, result in zip(columns, results):
                if not abs(result - sum(map(mul, row, column))) < 1e-4:  # also true of NaN
                    raise VulkanError(f"{gpu.physical.name} computes wrong products: {m} x {k} by {k} x {n}")


def main(arguments):
    if arguments == ["--compile"]:
        return compile_shader()
    if arguments:
        sys.exit("usage: python vulkan_gemm.py [--compile]")
    try:
        with ExitStack() as undo:
            vk = Vulkan()
            instance = create_instance(vk)
            undo.callback(vk.vkDestroyInstance, instance, None)
            print(*list_devices(vk, instance), sep="\n")
        with VulkanGemm() as gpu:
            check_products(gpu)
            print(f"{gpu.physical.name} computes right products")
    except VulkanError as error:
        sys.exit(f"vulkan_gemm: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
